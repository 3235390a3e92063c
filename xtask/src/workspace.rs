//! Where things are in the workspace, and how other programs are run in it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The workspace's root.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// The lab's folder under `target/`: packages, initrds, the share, the last host's console.
pub fn lab() -> PathBuf {
    root().join("target/lab")
}

/// The cargo that runs us, or the one in `PATH`, in the workspace's root.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// Runs a program to its end and gives what it wrote; an error that says the program's own words if it fails.
pub fn output(command: &mut Command) -> Result<String> {
    let words = words(command);
    let output = command.output().with_context(|| format!("run {words}"))?;
    if !output.status.success() {
        bail!("{words}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a program to its end with our own output; an error if it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let words = words(command);
    let status = command.status().with_context(|| format!("run {words}"))?;
    if !status.success() {
        bail!("{words}: {status}");
    }
    Ok(())
}

/// The command as one would type it.
pub fn words(command: &Command) -> String {
    let mut words = vec![command.get_program()];
    words.extend(command.get_args());
    words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Builds a release binary that needs no shared library, such as `-p keel-test-init` or `--example boot`, in a target folder
/// of its own: the flags differ, and one folder would build everything anew at each change of them.
pub fn build_static(what: &[&str], file: &str) -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let folder = root().join("target/static");
    run(cargo()
        .args(["build", "--quiet", "--release", "--target", TARGET, "--target-dir"])
        .arg(&folder)
        .args(what)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=debuginfo"))?;
    Ok(folder.join(TARGET).join("release").join(file))
}
