//! Lists that the kernel gives by netlink(7), message by message.

use std::io;

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};

/// More than the kernel puts into one datagram, of which it makes no longer ones than there is room for (`netlink_recvmsg`).
const ROOM: usize = 64 * 1024;

/// A socket to ask the kernel by, in the network namespace of this thread.
pub(super) fn open(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Asks for a list, and shows each message of it.
pub(super) fn dump<M>(socket: &Socket, request: M, mut see: impl FnMut(M)) -> io::Result<()>
where
    M: NetlinkSerializable + NetlinkDeserializable,
    NetlinkPayload<M>: From<M>,
{
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut request = NetlinkMessage::new(header, request.into());
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut room = Vec::with_capacity(ROOM);
    loop {
        room.clear();
        let len = socket.recv(&mut room, libc::MSG_TRUNC)?;
        if len > ROOM {
            return Err(io::Error::other("a message that is longer than the kernel makes any"));
        }
        if each_message(&room, &mut see)? {
            return Ok(());
        }
    }
}

/// Shows each message of a datagram. Returns whether the list ends with it.
pub(super) fn each_message<M: NetlinkDeserializable>(datagram: &[u8], see: &mut impl FnMut(M)) -> io::Result<bool> {
    let mut left = datagram;
    while !left.is_empty() {
        let message = NetlinkMessage::<M>::deserialize(left).map_err(io::Error::other)?;
        // Messages begin at multiples of four bytes.
        let len = (message.header.length as usize).next_multiple_of(4);
        match message.payload {
            NetlinkPayload::Done(done) if done.code < 0 => {
                return Err(io::Error::from_raw_os_error(done.code.saturating_neg()));
            }
            NetlinkPayload::Done(_) => return Ok(true),
            // `ErrorMessage::to_io` overflows for a code that the kernel does not send.
            NetlinkPayload::Error(error) => {
                return Err(io::Error::from_raw_os_error(error.raw_code().saturating_neg()));
            }
            NetlinkPayload::InnerMessage(message) => see(message),
            _ => {}
        }
        left = left.get(len.max(1)..).unwrap_or_default();
    }
    Ok(false)
}
