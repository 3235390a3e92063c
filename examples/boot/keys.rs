//! The Ctrl-A keys of a terminal that is a guest's serial port.

/// What typed bytes come to.
#[derive(Debug, PartialEq, Eq)]
pub enum Key {
    /// A byte for the guest.
    Data(u8),
    /// End the guest.
    Quit,
    /// Send a break.
    Break,
    /// Say something to the user.
    Say(&'static str),
}

const CTRL_A: u8 = 1;

const HELP: &str = "\r\n\
    Ctrl-A h    print this help\r\n\
    Ctrl-A x    end the guest\r\n\
    Ctrl-A b    send a break\r\n\
    Ctrl-A Ctrl-A  send Ctrl-A\r\n";

/// Takes Ctrl-A and the key after it out of what is typed.
#[derive(Debug, Default)]
pub struct Keys {
    escaped: bool,
}

impl Keys {
    /// What these bytes come to.
    pub fn feed<'a>(&'a mut self, bytes: &'a [u8]) -> impl Iterator<Item = Key> + 'a {
        bytes.iter().filter_map(|byte| {
            if !std::mem::take(&mut self.escaped) {
                self.escaped = *byte == CTRL_A;
                return (!self.escaped).then_some(Key::Data(*byte));
            }
            match byte {
                b'x' | b'X' => Some(Key::Quit),
                b'b' | b'B' => Some(Key::Break),
                b'h' | b'H' | b'?' => Some(Key::Say(HELP)),
                b'c' | b'C' => {
                    Some(Key::Say("\r\nboot: the monitor is not in this version of Keel\r\n"))
                }
                &CTRL_A => Some(Key::Data(CTRL_A)),
                _ => None,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_across_reads() {
        let mut keys = Keys::default();
        let mut feed = |bytes: &[u8]| keys.feed(bytes).collect::<Vec<_>>();
        assert_eq!(feed(b"a\x01"), [Key::Data(b'a')]);
        assert_eq!(feed(b"xb"), [Key::Quit, Key::Data(b'b')]);
        assert_eq!(feed(b"\x01\x01\x01z."), [Key::Data(1), Key::Data(b'.')]);
        assert_eq!(feed(b"\x01b"), [Key::Break]);
    }
}
