//! Keel's own commands: the tests, the lab, the generated parts of the documentation. `cargo xtask --help` is the manual.
//!
//! - `test`: `cargo xtask test`, everything there is
//! - `lab`: `cargo xtask lab`, the host in which stock kernels boot
//! - `docs`: `cargo xtask docs`, the blocks of the documentation that programs write
//! - `arrows`: the crates' dependencies against the drawing
//! - `tally`, `workspace`: counting; paths and other programs

#![forbid(unsafe_code)]
// A program's modules are its own: `pub` in them is for each other.
#![allow(missing_docs)]

mod arrows;
mod docs;
mod lab;
mod tally;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Keel's own commands")]
struct Xtask {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Test(test::Test),
    Lab(lab::cli::Lab),
    Docs(docs::Docs),
}

fn main() -> ExitCode {
    // `cargo xtask lab -- boot …` is the same as `cargo xtask lab boot …`.
    let mut words: Vec<_> = std::env::args_os().collect();
    if words.get(1).is_some_and(|word| word == "lab")
        && words.get(2).is_some_and(|word| word == "--")
    {
        words.remove(2);
    }
    let result = match Xtask::parse_from(words).command {
        Command::Test(test) => test.run(),
        Command::Lab(lab) => lab.run(),
        Command::Docs(docs) => docs.run(),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
