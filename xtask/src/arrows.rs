//! The dependency drawing in `docs/architecture.md` against what cargo says.
//!
//! The drawing is the fenced block that begins with ```` ```arrows ````: each line is `a -> b c d`, the packages of the
//! workspace that `a` may depend on in any way (`keel-` left out; nothing after the arrow for one that depends on none).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::workspace::{cargo, output, root};

/// A package's name without `keel-` and the names of those it depends on.
type Arrows = BTreeMap<String, BTreeSet<String>>;

/// Compares the two.
///
/// # Errors
/// Each arrow that is missing in the drawing, and each that is drawn but does not exist.
pub fn check() -> Result<String> {
    let path = root().join("docs/architecture.md");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let drawn = parse(&text)?;
    let metadata = output(cargo().args(["metadata", "--format-version=1", "--no-deps"]))?;
    let real = real(&serde_json::from_str(&metadata).context("read what cargo metadata says")?);
    let wrong = differences(&real, &drawn);
    if !wrong.is_empty() {
        bail!("docs/architecture.md is not what cargo says:\n{}", wrong.join("\n"));
    }
    Ok(format!(
        "{} packages, {} arrows",
        real.len(),
        real.values().map(BTreeSet::len).sum::<usize>()
    ))
}

fn short(name: &str) -> String {
    name.strip_prefix("keel-").unwrap_or(name).to_owned()
}

fn parse(text: &str) -> Result<Arrows> {
    let (_, rest) = text
        .split_once("```arrows\n")
        .context("docs/architecture.md has no block that begins ```arrows")?;
    let (block, _) =
        rest.split_once("```").context("the block of arrows in docs/architecture.md has no end")?;
    let mut arrows = Arrows::new();
    for line in block.lines().filter(|line| !line.trim().is_empty()) {
        let (from, to) =
            line.split_once("->").with_context(|| format!("{line:?} is not `a -> b c d`"))?;
        let to = to.split_whitespace().map(str::to_owned).collect();
        if arrows.insert(from.trim().to_owned(), to).is_some() {
            bail!("two lines are about {}", from.trim());
        }
    }
    Ok(arrows)
}

fn real(metadata: &Value) -> Arrows {
    let packages = metadata["packages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let name = |package: &Value| package["name"].as_str().map(str::to_owned);
    let members: BTreeSet<_> = packages.iter().filter_map(name).collect();
    let dependencies = |package: &Value| {
        let all = package["dependencies"].as_array().map(Vec::as_slice).unwrap_or_default();
        all.iter()
            .filter_map(name)
            .filter(|name| members.contains(name))
            .map(|name| short(&name))
            .collect()
    };
    packages
        .iter()
        .filter_map(|package| Some((short(&name(package)?), dependencies(package))))
        .collect()
}

fn differences(real: &Arrows, drawn: &Arrows) -> Vec<String> {
    let one_way = |from: &Arrows, to: &Arrows, words: &str| {
        let mut missing = Vec::new();
        for (package, targets) in from {
            let Some(others) = to.get(package) else {
                missing.push(format!("  {package}: {words}"));
                continue;
            };
            missing.extend(
                targets
                    .difference(others)
                    .map(|target| format!("  {package} -> {target}: {words}")),
            );
        }
        missing
    };
    let mut all = one_way(real, drawn, "is there but not drawn");
    all.extend(one_way(drawn, real, "is drawn but not there"));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrows(text: &str) -> Arrows {
        parse(&format!("# A\n\n```arrows\n{text}```\n")).unwrap()
    }

    #[test]
    fn a_missing_and_an_invented_arrow_are_both_named() {
        let metadata = serde_json::json!({"packages": [
            {"name": "keel-a", "dependencies": [{"name": "keel-b"}, {"name": "serde"}]},
            {"name": "keel-b", "dependencies": []},
        ]});
        let real = real(&metadata);
        assert_eq!(differences(&real, &arrows("a -> b\nb ->\n")), [""; 0]);
        assert_eq!(
            differences(&real, &arrows("a ->\nb ->\n")),
            ["  a -> b: is there but not drawn"]
        );
        assert_eq!(
            differences(&real, &arrows("a -> b\nb -> a\n")),
            ["  b -> a: is drawn but not there"]
        );
        assert_eq!(
            differences(&real, &arrows("a -> b\nc ->\n")),
            ["  b: is there but not drawn", "  c: is drawn but not there"]
        );
    }

    #[test]
    fn a_text_without_a_drawing_is_an_error() {
        assert!(parse("# Nothing").is_err());
        assert!(parse("```arrows\na b\n```").is_err());
    }
}
