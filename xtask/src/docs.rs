//! The parts of the documentation that are what a program prints.
//!
//! Between `<!-- output of: PROGRAM ARGUMENTS -->` and `<!-- end of output -->` in `README.md` or a file of `docs/` stands, as
//! a fenced block, what that command prints: PROGRAM is an example, `xtask`, or `cat` for a file of the project.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::workspace::{cargo, output, root, run};

const BEGIN: &str = "<!-- output of: ";
const END: &str = "<!-- end of output -->";

/// `cargo xtask docs`
#[derive(Args)]
#[command(
    about = "Write the parts of the documentation that are what a program prints",
    long_about = "Write the parts of the documentation that are what a program prints.\n\n\
        Between `<!-- output of: PROGRAM ARGUMENTS -->` and `<!-- end of output -->`, each on a line of its own, in \
        README.md and the files of docs/ stands what the command prints. PROGRAM is one of the examples, `xtask`, or `cat` for a file of the project."
)]
pub struct Docs {
    /// Change nothing: fail if something is not what it should be
    #[arg(long)]
    check: bool,
}

impl Docs {
    /// Does it, and gives the exit status.
    pub fn run(self) -> Result<u8> {
        println!("{}", if self.check { check()? } else { write()? });
        Ok(0)
    }
}

/// Writes every block anew.
pub fn write() -> Result<String> {
    let mut changed = Vec::new();
    for (path, before, after) in files()?.0 {
        if before != after {
            fs::write(&path, after).with_context(|| format!("write {}", path.display()))?;
            changed.push(path.display().to_string());
        }
    }
    Ok(if changed.is_empty() {
        "nothing has changed".into()
    } else {
        format!("wrote {}", changed.join(" "))
    })
}

/// Whether every block is what it should be.
pub fn check() -> Result<String> {
    let (files, blocks) = files()?;
    let stale: Vec<_> = files.iter().filter(|(_, before, after)| before != after).collect();
    if !stale.is_empty() {
        let names: Vec<_> = stale.iter().map(|(path, ..)| path.display().to_string()).collect();
        bail!("{} no longer says what the programs print: run `cargo xtask docs`", names.join(" "));
    }
    if blocks == 0 {
        bail!(
            "neither README.md nor docs/ has a block of what a program prints: `cargo xtask docs --help` says how"
        );
    }
    Ok(format!("{blocks} blocks are what the programs print"))
}

/// Every file that may have blocks: its path, its text, its text as it should be; and how many blocks there are.
type Files = (Vec<(PathBuf, String, String)>, usize);

fn files() -> Result<Files> {
    let mut paths = vec![root().join("README.md")];
    let mut folders = vec![root().join("docs")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                paths.push(path);
            }
        }
    }
    let (mut files, mut blocks) = (Vec::new(), 0);
    for path in paths.into_iter().filter(|path| path.is_file()) {
        let before =
            fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let (after, found) =
            fill(&before, &print).with_context(|| format!("in {}", path.display()))?;
        blocks += found;
        files.push((path, before, after));
    }
    Ok((files, blocks))
}

/// The text with every block replaced by what `print` gives for its command, and the number of blocks.
fn fill(text: &str, print: &dyn Fn(&str) -> Result<String>) -> Result<(String, usize)> {
    let (mut filled, mut rest, mut blocks) = (String::new(), text, 0);
    // Only at the beginning of a line: prose may speak of the markers.
    while let Some(at) = rest
        .match_indices(BEGIN)
        .map(|(at, _)| at)
        .find(|at| *at == 0 || rest[..*at].ends_with('\n'))
    {
        let (head, tail) = rest[at..].split_once('\n').unwrap_or((&rest[at..], ""));
        let command = head[BEGIN.len()..]
            .trim_end()
            .strip_suffix("-->")
            .context("a marker's line does not end in -->")?;
        let (_, after) =
            tail.split_once(END).with_context(|| format!("no {END:?} after {head:?}"))?;
        let language = if command.trim().ends_with(".rs") { "rust" } else { "text" };
        filled += &format!(
            "{}{head}\n```{language}\n{}\n```\n{END}",
            &rest[..at],
            print(command.trim())?.trim_end()
        );
        rest = after;
        blocks += 1;
    }
    Ok((filled + rest, blocks))
}

/// What a command prints.
fn print(command: &str) -> Result<String> {
    let mut words = command.split_whitespace();
    let program = words.next().context("a marker names no program")?;
    if program == "cat" {
        let path = root().join(words.next().context("cat names no file")?);
        return fs::read_to_string(&path).with_context(|| format!("read {}", path.display()));
    }
    let binary = if program == "xtask" {
        std::env::current_exe().context("find this program")?
    } else {
        run(cargo().args(["build", "--quiet", "--release", "--example", program]))?;
        target().join("release/examples").join(program)
    };
    // The width at which clap wraps where there is no terminal must not depend on the environment.
    let printed =
        output(Command::new(&binary).args(words).env_remove("COLUMNS").current_dir(root()))?;
    Ok(printed.lines().map(|line| line.trim_end().to_owned() + "\n").collect())
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root().join("target"), |folder| root().join(Path::new(&folder)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_replaced_and_the_rest_is_left() {
        let print = |command: &str| Ok(format!("{command} says this\n\n"));
        let text = format!("head `{BEGIN}x -->`\n{BEGIN}boot --help -->\nold\n{END}\ntail\n");
        let (filled, blocks) = fill(&text, &print).unwrap();
        let expected = format!(
            "head `{BEGIN}x -->`\n{BEGIN}boot --help -->\n```text\nboot --help says this\n```\n{END}\ntail\n"
        );
        assert_eq!((filled.as_str(), blocks), (expected.as_str(), 1));
        assert_eq!(fill(&filled, &print).unwrap().0, filled, "writing twice changes nothing");
        assert!(fill(&format!("{BEGIN}boot -->\nno end\n"), &print).is_err());
    }
}
