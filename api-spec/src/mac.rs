//! MAC addresses.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

/// The MAC address of one network interface, such as `06:00:ac:10:00:02`; no group address, and not all zeros.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr([u8; 6]);

impl JsonSchema for MacAddr {
    fn schema_name() -> Cow<'static, str> {
        "MacAddr".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // The second digit of a first byte that is even; all zeros are refused as well.
        json_schema!({ "type": "string", "pattern": "^[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}$" })
    }
}

/// Why something is no MAC address that an interface can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// It is written otherwise.
    #[error("`{0}` is no MAC address; write six bytes in hexadecimal, such as 06:00:ac:10:00:02")]
    Form(String),
    /// It stands for many.
    #[error("{0} is a multicast address, which no interface can have; the first byte must be even")]
    Group(String),
    /// It stands for none.
    #[error("00:00:00:00:00:00 is no address that an interface can have")]
    Zero,
}

impl MacAddr {
    /// The address of these bytes.
    pub fn new(bytes: [u8; 6]) -> Result<Self, MacError> {
        let address = MacAddr(bytes);
        match bytes {
            [0, 0, 0, 0, 0, 0] => Err(MacError::Zero),
            [first, ..] if first & 1 != 0 => Err(MacError::Group(address.to_string())),
            _ => Ok(address),
        }
    }

    /// An address of local administration, which nobody was given by a maker of hardware, out of random bytes.
    pub fn local(random: [u8; 6]) -> Self {
        let [first, rest @ ..] = random;
        let [a, b, c, d, e] = rest;
        MacAddr([first & !1 | 2, a, b, c, d, e])
    }

    /// Its bytes, in the order in which they are sent.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let wrong = || MacError::Form(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(wrong)?;
            // A sign would pass for a digit otherwise.
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() { Err(wrong()) } else { MacAddr::new(bytes) }
    }
}

impl TryFrom<String> for MacAddr {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(address: MacAddr) -> String {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_addresses_of_one_interface_are_taken() {
        assert_eq!("06:00:AC:10:00:02".parse::<MacAddr>().unwrap().to_string(), "06:00:ac:10:00:02");
        for wrong in
            ["", "06:00:ac:10:00", "06:00:ac:10:00:02:03", "06-00-ac-10-00-02", "6:0:ac:10:0:2", "+6:00:ac:10:00:02"]
        {
            assert_eq!(wrong.parse::<MacAddr>(), Err(MacError::Form(wrong.to_owned())));
        }
        assert_eq!("00:00:00:00:00:00".parse::<MacAddr>(), Err(MacError::Zero));
        for group in ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff"] {
            assert_eq!(group.parse::<MacAddr>(), Err(MacError::Group(group.to_owned())));
        }
        assert!(
            serde_json::from_str::<MacAddr>(r#""01:00:5e:00:00:01""#).unwrap_err().to_string().contains("multicast")
        );
    }

    proptest! {
        #[test]
        fn addresses_are_read_back(bytes: [u8; 6]) {
            let local = MacAddr::local(bytes);
            prop_assert_eq!(MacAddr::new(local.bytes()), Ok(local));
            prop_assert_eq!(local.bytes()[0] & 3, 2, "of local administration, and no group");
            prop_assert_eq!(local.to_string().parse(), Ok(local));
            if let Ok(address) = MacAddr::new(bytes) {
                prop_assert_eq!(serde_json::from_str::<MacAddr>(&serde_json::to_string(&address).unwrap()).unwrap(), address);
            }
        }
    }
}
