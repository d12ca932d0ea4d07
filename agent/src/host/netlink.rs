//! Reads lists from the kernel by netlink(7), message by message.

use std::io;

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};

/// The size of the receive buffer in bytes. It is larger than any datagram of a list. The kernel makes no datagram longer than
/// the reader's buffer (`netlink_recvmsg`, net/netlink/af_netlink.c).
const BUFFER_SIZE: usize = 64 * 1024;

/// Opens a netlink socket to the kernel, in the network namespace of the calling thread.
pub(super) fn open(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Requests a list, and calls `visit` with each message of it.
pub(super) fn dump<M>(socket: &Socket, request: M, mut visit: impl FnMut(M)) -> io::Result<()>
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
    let mut buffer = Vec::with_capacity(BUFFER_SIZE);
    loop {
        buffer.clear();
        let len = socket.recv(&mut buffer, libc::MSG_TRUNC)?;
        if len > BUFFER_SIZE {
            return Err(io::Error::other(format!("cannot read a netlink datagram of {len} bytes: too long")));
        }
        if each_message(&buffer, &mut visit)? {
            return Ok(());
        }
    }
}

/// Calls `visit` with each message of a datagram. Returns whether the list ends in this datagram.
pub(super) fn each_message<M: NetlinkDeserializable>(datagram: &[u8], visit: &mut impl FnMut(M)) -> io::Result<bool> {
    let mut rest = datagram;
    while !rest.is_empty() {
        let message = NetlinkMessage::<M>::deserialize(rest).map_err(io::Error::other)?;
        // Messages start at multiples of four bytes.
        let len = (message.header.length as usize).next_multiple_of(4);
        match message.payload {
            NetlinkPayload::Done(done) if done.code < 0 => {
                return Err(io::Error::from_raw_os_error(done.code.saturating_neg()));
            }
            NetlinkPayload::Done(_) => return Ok(true),
            // Not by `ErrorMessage::to_io`, which overflows for i32::MIN.
            NetlinkPayload::Error(error) => {
                return Err(io::Error::from_raw_os_error(error.raw_code().saturating_neg()));
            }
            NetlinkPayload::InnerMessage(message) => visit(message),
            _ => {}
        }
        rest = rest.get(len.max(1)..).unwrap_or_default();
    }
    Ok(false)
}
