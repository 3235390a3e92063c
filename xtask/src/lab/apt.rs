//! Debian's packages, from the mirrors that this machine is configured for: no host is named here.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::workspace::{output, run};

/// Where apt's sources stand.
const FOLDER: &str = "/etc/apt";
/// The file that is written for the backports suite.
const BACKPORTS: &str = "/etc/apt/sources.list.d/keel-backports.sources";

/// One archive of apt's sources.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    address: String,
    suites: Vec<String>,
    signed_by: Option<String>,
}

/// Whether this machine has apt at all.
pub fn is_there() -> bool {
    Path::new("/usr/bin/apt-get").exists()
}

/// Whether we may install.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The package that `name`, a package without content of its own, depends on and whose name begins with `prefix`.
pub fn dependency(name: &str, prefix: &str) -> Result<String> {
    let find = || -> Result<Option<String>> {
        let listed = output(Command::new("apt-cache").args(["depends", name]))?;
        let mut depends = listed.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        Ok(depends.find(|package| package.starts_with(prefix)).map(str::to_owned))
    };
    // No list may have been fetched yet, or only an old one.
    if let Ok(Some(package)) = find() {
        return Ok(package);
    }
    if is_root() {
        run(Command::new("apt-get").args(["update", "-q"]))?;
    }
    find()?.with_context(|| {
        format!("{name} depends on no {prefix}…: is this Debian, and was `apt-get update` run?")
    })
}

/// Downloads a package's file into `folder`.
pub fn download(package: &str, folder: &Path) -> Result<()> {
    println!("lab: apt-get download {package}");
    // As root, apt downloads as the user _apt, who may not write here: an option says that root is fine.
    let mut apt = Command::new("apt-get");
    apt.args(["download", "-q", "-o", "APT::Sandbox::User=root", package]).current_dir(folder);
    output(&mut apt).map(drop)
}

/// Makes packages of the release's backports suite installable, and installs them.
///
/// # Errors
/// When we are not root: the commands to type.
pub fn install_from_backports(packages: &[&str]) -> Result<()> {
    let release =
        codename(&fs::read_to_string("/etc/os-release").context("read /etc/os-release")?)?;
    let (suite, sources) = (format!("{release}-backports"), sources()?);
    let known = sources.iter().any(|source| source.suites.contains(&suite));
    // The release's own QEMU is new enough where no backport is needed.
    let wanted = if release == "bookworm" { Some(suite.as_str()) } else { None };
    let file = match wanted.filter(|_| !known) {
        Some(suite) => Some(backports_file(&sources, &release, suite)?),
        None => None,
    };
    let mut install = vec!["install", "-y", "-q", "--no-install-recommends"];
    install.extend(wanted.into_iter().flat_map(|suite| ["-t", suite]));
    install.extend(packages);
    if !is_root() {
        let file = file
            .map(|text| format!("write this to {BACKPORTS}:\n{text}\nand "))
            .unwrap_or_default();
        bail!("as root, {file}run:\n  apt-get update\n  apt-get {}", install.join(" "));
    }
    if let Some(text) = file {
        println!("lab: adding the suite {suite} in {BACKPORTS}");
        fs::write(BACKPORTS, text).with_context(|| format!("write {BACKPORTS}"))?;
    }
    run(Command::new("apt-get").args(["update", "-q"]))?;
    println!("lab: apt-get {}", install.join(" "));
    run(Command::new("apt-get").args(install).env("DEBIAN_FRONTEND", "noninteractive"))
}

fn codename(release: &str) -> Result<String> {
    let line = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(line.context("/etc/os-release names no VERSION_CODENAME")?.trim_matches('"').to_owned())
}

fn sources() -> Result<Vec<Source>> {
    let mut all = Vec::new();
    let list = Path::new(FOLDER).join("sources.list");
    if let Ok(text) = fs::read_to_string(&list) {
        all.extend(parse_list(&text));
    }
    let folder = Path::new(FOLDER).join("sources.list.d");
    for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        let parse = match path.extension().and_then(|extension| extension.to_str()) {
            Some("list") => parse_list,
            Some("sources") => parse_deb822,
            _ => continue,
        };
        all.extend(parse(
            &fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?,
        ));
    }
    Ok(all)
}

/// `sources.list(5)`, the one-line format: `deb [option=value …] address suite component …`.
fn parse_list(text: &str) -> Vec<Source> {
    let line = |line: &str| {
        let rest = line.split('#').next()?.trim().strip_prefix("deb ")?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let signed_by =
            options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
        let mut words = rest.split_whitespace().map(str::to_owned);
        Some(Source {
            address: words.next()?,
            suites: vec![words.next()?],
            signed_by: signed_by.map(str::to_owned),
        })
    };
    text.lines().filter_map(line).collect()
}

/// `sources.list(5)`, the deb822 format: paragraphs of fields.
fn parse_deb822(text: &str) -> Vec<Source> {
    let without_comments: String = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(|line| [line.trim_end(), "\n"])
        .collect();
    let paragraph = |paragraph: &str| {
        // A line that begins with a space goes on with the field before it.
        let joined = paragraph.replace("\n ", " ").replace("\n\t", " ");
        let field = |name: &str| {
            let mut fields = joined.lines().filter_map(|line| line.split_once(':'));
            fields
                .find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.trim().to_owned())
        };
        let off = field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
        if off || !field("Types")?.split_whitespace().any(|kind| kind == "deb") {
            return None;
        }
        let suites: Vec<_> = field("Suites")?.split_whitespace().map(str::to_owned).collect();
        let signed_by = field("Signed-By");
        let addresses = field("URIs")?;
        let source = |address: &str| Source {
            address: address.into(),
            suites: suites.clone(),
            signed_by: signed_by.clone(),
        };
        Some(addresses.split_whitespace().map(source).collect::<Vec<_>>())
    };
    without_comments.split("\n\n").filter_map(paragraph).flatten().collect()
}

/// The text of a source for `suite` at the mirror that the release itself comes from.
fn backports_file(sources: &[Source], release: &str, suite: &str) -> Result<String> {
    let main = sources.iter().find(|source| source.suites.iter().any(|suite| suite == release));
    let main = main.with_context(|| format!("no source in {FOLDER} has the suite {release}"))?;
    let signed =
        main.signed_by.as_ref().map(|key| format!("Signed-By: {key}\n")).unwrap_or_default();
    Ok(format!("Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\n{signed}", main.address))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "Types: deb deb-src\n# a comment\nURIs: mirror:/one\nSuites: bookworm\n bookworm-updates\n\
        Components: main\nSigned-By: /keys/one\n\nTypes: deb\nURIs: mirror:/security\nSuites: bookworm-security\n\
        Components: main\n\nEnabled: no\nTypes: deb\nURIs: mirror:/off\nSuites: bookworm\nComponents: main\n";

    #[test]
    fn both_formats_are_read() {
        let one = Source {
            address: "mirror:/one".into(),
            suites: vec!["bookworm".into(), "bookworm-updates".into()],
            signed_by: Some("/keys/one".into()),
        };
        let deb822 = parse_deb822(DEB822);
        assert_eq!(deb822.len(), 2, "the disabled one is left out: {deb822:?}");
        assert_eq!(deb822[0], one);
        let list = parse_list(
            "# deb mirror:/no bookworm main\ndeb-src mirror:/src bookworm main\n\
             deb [arch=amd64 signed-by=/keys/one] mirror:/one bookworm main # why\ndeb mirror:/two trixie main\n",
        );
        assert_eq!(list[0], Source { suites: vec!["bookworm".into()], ..one });
        assert_eq!((list.len(), list[1].address.as_str()), (2, "mirror:/two"));
    }

    #[test]
    fn the_backports_come_from_the_configured_mirror() {
        let text = backports_file(&parse_deb822(DEB822), "bookworm", "bookworm-backports").unwrap();
        assert_eq!(
            text,
            "Types: deb\nURIs: mirror:/one\nSuites: bookworm-backports\nComponents: main\nSigned-By: /keys/one\n"
        );
        assert!(backports_file(&[], "bookworm", "bookworm-backports").is_err());
    }

    #[test]
    fn the_codename_may_be_quoted() {
        assert_eq!(
            codename("NAME=\"Debian\"\nVERSION_CODENAME=\"bookworm\"\n").unwrap(),
            "bookworm"
        );
    }
}
