//! Names that others chose, in everything that people read: no control characters, and no line that a name began.
