//! The channel between `xtask` and the agent: frames over one byte stream, each belonging to a numbered session.
//!
//! A frame is `session: u32`, `kind: u8`, `length: u32` (little endian) and `length` bytes. A session is one command: it
//! begins with [`Kind::Start`] from `xtask` and ends with [`Kind::Exit`] from the agent; any number run side by side.

use std::io::{self, Read, Write};

/// No frame's payload is longer, in bytes. Longer output is several frames; a longer length on the wire is an error.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Agent: the host is up and commands are welcome. The payload is empty, the session 0.
    Ready = 1,
    /// `xtask`: run a command. The payload is a [`Start`].
    Start = 2,
    /// `xtask`: bytes for the command's standard input; an empty payload is end of file.
    Input = 3,
    /// `xtask`: send a signal to the command's process group. The payload is its number, an `i32`.
    Signal = 4,
    /// `xtask`: the terminal has a new size. The payload is `rows: u16`, `columns: u16`.
    Resize = 5,
    /// Agent: bytes of the command's standard output (of its terminal, if it has one).
    Output = 6,
    /// Agent: bytes of the command's standard error.
    Error = 7,
    /// Agent: the command has ended and this is the session's last frame. The payload is an `i32`: the exit status, or
    /// 128 and the number of the signal that ended it, or 127 if it could not be started.
    Exit = 8,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::*;
        [Ready, Start, Input, Signal, Resize, Output, Error, Exit]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The command it belongs to.
    pub session: u32,
    /// What it says.
    pub kind: Kind,
    /// Its bytes, at most [`MAX_PAYLOAD`].
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame of these parts.
    pub fn new(session: u32, kind: Kind, payload: Vec<u8>) -> Self {
        Self { session, kind, payload }
    }

    /// Writes the frame whole.
    ///
    /// # Errors
    /// Those of the writer, and `InvalidInput` for a payload over [`MAX_PAYLOAD`].
    pub fn write_to(&self, writer: &mut impl Write) -> io::Result<()> {
        if self.payload.len() > MAX_PAYLOAD {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a frame's payload is too long",
            ));
        }
        let mut bytes = Vec::with_capacity(9 + self.payload.len());
        bytes.extend_from_slice(&self.session.to_le_bytes());
        bytes.push(self.kind as u8);
        bytes.extend_from_slice(&(self.payload.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&self.payload);
        writer.write_all(&bytes)?;
        writer.flush()
    }

    /// Reads the next frame; `None` at the end of the stream between two frames.
    ///
    /// # Errors
    /// Those of the reader, `UnexpectedEof` inside a frame, `InvalidData` for an unknown kind or a length over
    /// [`MAX_PAYLOAD`].
    pub fn read_from(reader: &mut impl Read) -> io::Result<Option<Self>> {
        let mut header = [0; 9];
        let got = loop {
            match reader.read(&mut header[..1]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if got == 0 {
            return Ok(None);
        }
        reader.read_exact(&mut header[1..])?;
        let [s0, s1, s2, s3, kind, l0, l1, l2, l3] = header;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let kind = Kind::from_byte(kind).filter(|_| length <= MAX_PAYLOAD).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "not a frame of the lab's channel")
        })?;
        let mut payload = vec![0; length];
        reader.read_exact(&mut payload)?;
        Ok(Some(Self { session: u32::from_le_bytes([s0, s1, s2, s3]), kind, payload }))
    }
}

/// The payload of [`Kind::Start`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// The terminal to give the command, as rows and columns; without one it has three pipes.
    pub terminal: Option<(u16, u16)>,
    /// The command line, for `sh -c`.
    pub command: String,
}

impl Start {
    /// The payload's bytes: rows and columns (0 and 0 for none), then the command.
    pub fn encode(&self) -> Vec<u8> {
        let (rows, columns) = self.terminal.unwrap_or_default();
        let mut bytes = Vec::with_capacity(4 + self.command.len());
        bytes.extend_from_slice(&rows.to_le_bytes());
        bytes.extend_from_slice(&columns.to_le_bytes());
        bytes.extend_from_slice(self.command.as_bytes());
        bytes
    }

    /// The payload from its bytes; `None` if they are too few or the command is not UTF-8.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (&[r0, r1, c0, c1], command) = bytes.split_first_chunk()?;
        let size = (u16::from_le_bytes([r0, r1]), u16::from_le_bytes([c0, c1]));
        Some(Self {
            terminal: (size != (0, 0)).then_some(size),
            command: String::from_utf8(command.to_vec()).ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_cut_short_or_of_an_unknown_kind_is_an_error() {
        let mut wire = Vec::new();
        Frame::new(1, Kind::Input, vec![9; 5]).write_to(&mut wire).unwrap();
        for cut in 1..wire.len() {
            let error = Frame::read_from(&mut &wire[..cut]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "cut at {cut}");
        }
        wire[4] = 99;
        assert_eq!(
            Frame::read_from(&mut wire.as_slice()).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        wire[4] = Kind::Input as u8;
        wire[5..9].copy_from_slice(&(MAX_PAYLOAD as u32 + 1).to_le_bytes());
        assert_eq!(
            Frame::read_from(&mut wire.as_slice()).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn a_start_survives_its_bytes() {
        for terminal in [None, Some((24, 80))] {
            let start = Start { terminal, command: "echo ünïcode".into() };
            assert_eq!(Start::decode(&start.encode()), Some(start));
        }
        assert_eq!(Start::decode(&[0; 3]), None);
    }
}
