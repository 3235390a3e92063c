//! What both roles of the init need of the system: mounts, modules, the kernel command line, the end.

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::Path;

use rustix::mount::{MountFlags, mount};
use rustix::system::RebootCommand;

/// An error with the words of what was tried.
pub type Result<T> = std::result::Result<T, String>;

/// The kernel command line's `name=value` words.
pub struct CommandLine(String);

impl CommandLine {
    /// Mounts `/proc` if it is not there yet and reads the command line; empty if that cannot be done.
    pub fn read() -> Self {
        if !Path::new("/proc/cmdline").exists() {
            // A failure shows as the empty command line, and the init then says what it did not find.
            let _ = fs::create_dir_all("/proc")
                .map(|()| mount("proc", "/proc", "proc", MountFlags::empty(), None));
        }
        Self(fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    /// The last value of `name`, as the kernel itself takes the last.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0
            .split_whitespace()
            .filter_map(|word| word.split_once('='))
            .rfind(|(key, _)| *key == name)
            .map(|(_, value)| value)
    }
}

/// Mounts `kind` on `target`, which is made if it is not there. One already mounted by the kernel (`/dev`) is no error.
pub fn mount_at(source: &str, target: &str, kind: &str, data: &str) -> Result<()> {
    let said = |error: &dyn std::fmt::Display| format!("mount {kind} on {target}: {error}");
    fs::create_dir_all(target).map_err(|error| said(&error))?;
    let data = CString::new(data).map_err(|error| said(&error))?;
    match mount(source, target, kind, MountFlags::empty(), data.as_c_str()) {
        Ok(()) | Err(rustix::io::Errno::BUSY) => Ok(()),
        Err(error) => Err(said(&error)),
    }
}

/// Inserts the modules that `/modules/load` lists: one a line, a file name in `/modules` and then its parameters.
pub fn load_modules() -> Result<()> {
    let Ok(list) = fs::read_to_string("/modules/load") else { return Ok(()) };
    for line in list.lines().filter(|line| !line.trim().is_empty()) {
        let (file, parameters) = line.split_once(' ').unwrap_or((line, ""));
        let said = |error: &dyn std::fmt::Display| format!("insert the module {file}: {error}");
        let module = fs::File::open(format!("/modules/{file}")).map_err(|error| said(&error))?;
        let parameters = CString::new(parameters).map_err(|error| said(&error))?;
        match rustix::system::finit_module(&module, &parameters, 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(said(&error)),
        }
    }
    Ok(())
}

/// A small file's text without the white space around it.
pub fn read(path: &str) -> Result<String> {
    fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .map_err(|error| format!("read {path}: {error}"))
}

/// Writes `text` to a file that exists, such as one of `/proc` or `/sys`.
pub fn write(path: &str, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|error| format!("write {text:?} to {path}: {error}"))
}

/// Lets the console drain, then ends the machine as told. Returns only if the kernel refused.
pub fn end(how: RebootCommand) {
    drain();
    if let Err(error) = rustix::system::reboot(how) {
        println!("keel: error reboot: {error}");
    }
    loop {
        std::thread::park();
    }
}

/// Waits until the console has sent everything: what is still in its buffer at a reset is lost.
pub fn drain() {
    let _ = io::Write::flush(&mut io::stdout());
    let _ = rustix::termios::tcdrain(io::stdout());
}
