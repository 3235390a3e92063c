//! A writer of cpio archives in the `newc` format, which is what the kernel unpacks an initrd from
//! (Linux, `Documentation/driver-api/early-userspace/buffer-format.rst`).

/// The file type's bits of a mode, as in `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being made. Everything in it belongs to root and has the time 0, so that equal content is equal bytes.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a directory. Its parents must have been added before it.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// Adds a file with permissions such as `0o755`.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.entry(path, REGULAR | permissions, (0, 0), content);
    }

    /// Adds a character device.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER | 0o600, (major, minor), &[]);
    }

    /// Ends the archive and gives its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let fields = [
            self.entries, // inode: distinct, or the kernel takes two files for one with two names
            mode,
            0, // user
            0, // group
            1, // links
            0, // time
            content.len() as u32,
            0, // the archive's own device, major and minor
            0,
            device.0,
            device.1,
            path.len() as u32 + 1,
            0, // check sum: only the `crc` format's
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    /// Names and contents each begin at a multiple of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    fn sample() -> Vec<u8> {
        let mut archive = Archive::default();
        archive.directory("dev");
        archive.character_device("dev/console", 5, 1);
        archive.file("init", 0o755, b"seven b");
        archive.finish()
    }

    #[test]
    fn every_header_begins_at_a_multiple_of_four() {
        let bytes = sample();
        assert_eq!(bytes.len() % 4, 0);
        let starts: Vec<_> = bytes
            .windows(6)
            .enumerate()
            .filter(|(_, w)| *w == b"070701")
            .map(|(at, _)| at)
            .collect();
        assert_eq!(starts.len(), 4);
        assert!(starts.iter().all(|at| at % 4 == 0), "{starts:?}");
        // The sizes in the header of `init`: file size at 54, name size at 94.
        let init = &bytes[starts[2]..];
        assert_eq!((&init[54..62], &init[94..102]), (&b"00000007"[..], &b"00000005"[..]));
        assert_eq!(&init[110..115], b"init\0");
        assert_eq!(&init[116..124], b"seven b\0");
    }

    /// Another's reader: `cpio` itself, or the busybox that the lab fetched. Where there is neither, this checks nothing
    /// more than the test above and says so.
    #[test]
    fn another_cpio_lists_the_same_names() {
        let fetched = crate::workspace::root().join("target/lab/root/busybox/bin/busybox");
        let fetched = fetched.to_string_lossy().into_owned();
        let reader = [vec!["cpio"], vec!["busybox", "cpio"], vec![fetched.as_str(), "cpio"]]
            .into_iter()
            .find_map(|words| {
                Command::new(words[0])
                    .args(&words[1..])
                    .args(["-i", "-t"])
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::null())
                    .spawn()
                    .ok()
            });
        let Some(mut reader) = reader else {
            eprintln!(
                "neither cpio nor busybox is installed: only our own reading of the format was checked"
            );
            return;
        };
        reader.stdin.take().unwrap().write_all(&sample()).unwrap();
        let listed = reader.wait_with_output().unwrap();
        assert!(listed.status.success());
        assert_eq!(String::from_utf8(listed.stdout).unwrap(), "dev\ndev/console\ninit\n");
    }
}
