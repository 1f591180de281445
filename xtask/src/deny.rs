//! What the workspace depends on: licences and sources. Asks `cargo tree` and reads `Cargo.lock`;
//! needs no network once the dependencies are there. What it cannot know offline is whether a
//! version was withdrawn or has a published advisory: every version is pinned with its checksum.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Instant;

use crate::cargo;
use crate::licence::allows;
use crate::summary::{Counts, Row};

const ALLOWED: &str = include_str!("../allowed-licences.txt");

/// Licences and sources, as one line of the summary.
pub fn check(root: &Path) -> Row {
    println!("\n== licences and sources");
    let start = Instant::now();
    let mut faults = Vec::new();
    let mut notes = Vec::new();
    match std::fs::read_to_string(root.join("Cargo.lock")) {
        Ok(lock) => {
            faults.extend(sources(&lock));
            notes.extend(duplicates(&lock));
        }
        Err(error) => faults.push(format!("Cargo.lock: {error}")),
    }
    match tree() {
        Ok(text) => faults.extend(licences(&text)),
        Err(error) => faults.push(error),
    }
    notes.iter().chain(&faults).for_each(|line| println!("{line}"));
    Row {
        name: "licences and sources".to_owned(),
        counts: if faults.is_empty() { Counts::PASSED } else { Counts::FAILED },
        notes: faults,
        took: start.elapsed(),
    }
}

/// Every package that is built here, one a line: name and version, a bar, its licence.
fn tree() -> Result<String, String> {
    let out = cargo(&[
        "tree",
        "--workspace",
        "--locked",
        "--prefix",
        "none",
        "--edges",
        "normal,build,dev",
    ])
    .args(["--format", "{p}|{l}"])
    .output()
    .map_err(|error| format!("cargo tree: {error}"))?;
    if !out.status.success() {
        return Err(format!("cargo tree: {}", String::from_utf8_lossy(&out.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn licences(tree: &str) -> Vec<String> {
    let lines = || ALLOWED.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let allowed = |name: &str| lines().any(|line| line == name);
    // A package that was shown before comes with a mark behind.
    let packages: BTreeSet<_> = tree
        .lines()
        .map(|line| line.trim_end_matches(" (*)"))
        .filter(|line| !line.is_empty())
        .collect();
    let fault = |line: &&str| {
        let (package, licence) = line.split_once('|').unwrap_or((line, ""));
        match allows(licence, &allowed) {
            Some(true) => None,
            Some(false) => Some(format!("{package}: the licence {licence} is not allowed")),
            None => Some(format!("{package}: no licence to be understood: {licence:?}")),
        }
    };
    packages.iter().filter_map(fault).collect()
}

/// The values of one package's entry in the lock file.
fn packages(lock: &str) -> impl Iterator<Item = BTreeMap<&str, &str>> {
    lock.split("[[package]]").skip(1).map(|entry| {
        entry
            .lines()
            .filter_map(|line| line.split_once(" = "))
            .map(|(key, value)| (key, value.trim_matches('"')))
            .collect()
    })
}

/// Only this workspace and one registry, with checksums.
fn sources(lock: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let mut registry = None;
    for package in packages(lock) {
        let name = package.get("name").copied().unwrap_or("?");
        let Some(&source) = package.get("source") else { continue };
        if !source.starts_with("registry+") {
            faults.push(format!("{name}: not from a registry: {source}"));
        } else if *registry.get_or_insert(source) != source {
            faults.push(format!("{name}: from a second registry: {source}"));
        } else if !package.contains_key("checksum") {
            faults.push(format!("{name}: no checksum"));
        }
    }
    faults
}

/// Not a fault, but worth knowing.
fn duplicates(lock: &str) -> Vec<String> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages(lock) {
        if let (Some(name), Some(version)) = (package.get("name"), package.get("version")) {
            versions.entry(name).or_default().push(version);
        }
    }
    versions.retain(|_, versions| versions.len() > 1);
    versions
        .iter()
        .map(|(name, versions)| {
            format!("note: several versions of {name}: {}", versions.join(", "))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licences_are_checked() {
        assert_eq!(licences("a v1|MIT OR Apache-2.0\na v1|MIT OR Apache-2.0 (*)\n"), [""; 0]);
        assert_eq!(licences("a v1|GPL-3.0\nb v2|\n").len(), 2);
    }

    #[test]
    fn sources_are_checked() {
        let entry = |name: &str, rest: &str| {
            format!("[[package]]\nname = \"{name}\"\nversion = \"1.0.0\"\n{rest}\n")
        };
        let own = entry("own", "");
        let good = entry("good", "source = \"registry+x\"\nchecksum = \"00\"");
        assert_eq!(sources(&format!("{own}{good}")), [""; 0]);
        for bad in [
            entry("git", "source = \"git+x\""),
            entry("other", "source = \"registry+y\"\nchecksum = \"00\""),
            entry("bare", "source = \"registry+x\""),
        ] {
            assert_eq!(sources(&format!("{own}{good}{bad}")).len(), 1, "{bad}");
        }
        assert_eq!(duplicates(&format!("{own}{good}")), [""; 0]);
        assert_eq!(duplicates(&format!("{good}{good}")).len(), 1);
    }
}
