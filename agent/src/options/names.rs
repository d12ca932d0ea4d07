//! Names that numbers have.

/// The differentiated services code points that have names (RFC 2474, 2597, 3246, 5865, 8622), at
/// their place in the byte.
pub const DSCP_NAMES: &[(&str, u8)] = &[
    ("CS0", 0x00),
    ("LE", 0x04),
    ("CS1", 0x20),
    ("AF11", 0x28),
    ("AF12", 0x30),
    ("AF13", 0x38),
    ("CS2", 0x40),
    ("AF21", 0x48),
    ("AF22", 0x50),
    ("AF23", 0x58),
    ("CS3", 0x60),
    ("AF31", 0x68),
    ("AF32", 0x70),
    ("AF33", 0x78),
    ("CS4", 0x80),
    ("AF41", 0x88),
    ("AF42", 0x90),
    ("AF43", 0x98),
    ("CS5", 0xa0),
    ("VA", 0xb0),
    ("EF", 0xb8),
    ("CS6", 0xc0),
    ("CS7", 0xe0),
];
