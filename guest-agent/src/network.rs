//! Network interfaces, through the kernel's own messages (rtnetlink).

use api_spec::agent::linux::{Address, Interface};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeader, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkHeader, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, sendto, socket_with};
use std::io;
use std::net::IpAddr;

/// The kernel's end of a netlink socket.
const KERNEL: SocketAddrNetlink = SocketAddrNetlink::new(0, 0);
/// The kernel sends at most so many bytes at a time.
const BUFFER: usize = 64 * 1024;

/// Takes an interface down, gives it its MAC address, addresses and default routes, and brings it up again. Taking it
/// down makes the guest forget its neighbours, and whoever manages the link in the guest look at it again.
pub fn configure(interface: &Interface) -> io::Result<()> {
    let mut kernel = Kernel::new()?;
    let index = name_to_index(&kernel.socket, &interface.name)?;
    kernel.set_up(index, false)?;
    if let Some(mac) = interface.mac {
        kernel.set_mac(index, mac)?;
    }
    if !interface.addresses.is_empty() {
        for old in kernel.addresses(index)? {
            match kernel.change(RouteNetlinkMessage::DelAddress(old), 0) {
                // It went with the link.
                Err(e) if e.raw_os_error() == Some(Errno::ADDRNOTAVAIL.raw_os_error()) => {}
                other => other?,
            }
        }
    }
    kernel.set_up(index, true)?;
    for address in &interface.addresses {
        kernel.add_address(index, address)?;
    }
    for gateway in &interface.gateways {
        kernel.add_default_route(index, *gateway)?;
    }
    Ok(())
}

/// Brings the loopback interface up.
pub fn loopback() -> io::Result<()> {
    let mut kernel = Kernel::new()?;
    let index = name_to_index(&kernel.socket, "lo")?;
    kernel.set_up(index, true)
}

/// A conversation with the kernel about its network.
struct Kernel {
    socket: OwnedFd,
    sequence: u32,
}

impl Kernel {
    fn new() -> io::Result<Self> {
        let family = rustix::net::AddressFamily::NETLINK;
        let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Kernel { socket, sequence: 0 })
    }

    fn set_up(&mut self, index: u32, up: bool) -> io::Result<()> {
        let flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        let mut message = LinkMessage::default();
        message.header = LinkHeader { index, flags, change_mask: LinkFlags::Up, ..LinkHeader::default() };
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    fn set_mac(&mut self, index: u32, mac: [u8; 6]) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header = LinkHeader { index, ..LinkHeader::default() };
        message.attributes = vec![LinkAttribute::Address(mac.to_vec())];
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    fn add_address(&mut self, index: u32, address: &Address) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header = AddressHeader {
            family: family_of(address.address),
            prefix_len: address.prefix,
            // Whoever gave the address knows that nobody else has it.
            flags: AddressHeaderFlags::Nodad,
            scope: AddressScope::Universe,
            index,
        };
        message.attributes = vec![
            AddressAttribute::Local(address.address),
            AddressAttribute::Address(address.address),
            AddressAttribute::Flags(AddressFlags::Nodad),
        ];
        self.change(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn add_default_route(&mut self, index: u32, gateway: IpAddr) -> io::Result<()> {
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: family_of(gateway),
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::Static,
            scope: RouteScope::Universe,
            kind: RouteType::Unicast,
            ..RouteHeader::default()
        };
        message.attributes = vec![RouteAttribute::Gateway(RouteAddress::from(gateway)), RouteAttribute::Oif(index)];
        self.change(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// The addresses of an interface.
    fn addresses(&mut self, index: u32) -> io::Result<Vec<AddressMessage>> {
        let answers = self.ask(RouteNetlinkMessage::GetAddress(AddressMessage::default()), NLM_F_DUMP)?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewAddress(address) if address.header.index == index => Some(address),
                _ => None,
            })
            .collect())
    }

    fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.ask(message, NLM_F_ACK | flags).map(drop)
    }

    /// Asks, and gathers what comes until the kernel says that this was all.
    fn ask(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        (header.flags, header.sequence_number) = (NLM_F_REQUEST | flags, self.sequence);
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        sendto(&self.socket, &bytes, SendFlags::empty(), &KERNEL)?;

        let mut answers = Vec::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            let (len, _) = recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = &buffer[..len.min(BUFFER)];
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
                // Messages begin at multiples of four.
                let whole = (answer.header.length as usize).next_multiple_of(4);
                rest = rest.get(whole..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(e) if e.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(e) => return Err(e.to_io()),
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    _ => {}
                }
            }
        }
    }
}

fn family_of(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}
