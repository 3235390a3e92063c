//! PID 1 of the lab's guests and of the lab's host; see the library's first lines, and `guest.rs` for `keel.do=`.

#![forbid(unsafe_code)]

mod agent;
mod checks;
mod checksum;
mod guest;
mod host;
mod system;

fn main() {
    let command_line = system::CommandLine::read();
    let result = match std::env::args().nth(1).as_deref() {
        Some("agent") => agent::run(),
        _ if command_line.get("keel.role") == Some("host") => host::run(),
        _ => guest::run(),
    };
    if let Err(error) = result {
        println!("keel: error {error}");
        system::end(rustix::system::RebootCommand::PowerOff);
    }
}
