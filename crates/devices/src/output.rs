//! Where the characters go that a guest writes.

use std::io::{self, Write};

/// A writer that never fails: what can not be written is lost and counted, for no guest should stop because whoever watched it has gone.
pub(crate) struct Output {
    to: Box<dyn Write + Send>,
    lost: u64,
}

impl Output {
    pub fn new(to: Box<dyn Write + Send>) -> Self {
        Output { to, lost: 0 }
    }

    /// How many bytes could not be written so far.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.to.write_all(bytes).and_then(|()| self.to.flush()).is_err() {
            self.lost += bytes.len() as u64;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    /// A writer whose bytes a test can look at.
    #[derive(Clone, Default)]
    pub struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Shared {
        pub fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A pipe nobody reads any more.
    pub struct Closed;

    impl Write for Closed {
        fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}
