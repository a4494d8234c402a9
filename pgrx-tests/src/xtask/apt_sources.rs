//! Reads apt's source lists, in both formats, and writes the line for another release of the same archive.
//!
//! Pure text to text: never runs apt, never touches the machine's lists.

use anyhow::{anyhow, Result};

/// One archive that the machine installs from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    pub uris: Vec<String>,
    pub suites: Vec<String>,
    pub components: Vec<String>,
    pub signed_by: Option<String>,
}

/// `sources.list`: lines of `deb [options] uri suite component...`. Only `deb` counts: what is installed from.
pub fn parse_one_line(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let rest = line.strip_prefix("deb")?;
    if !rest.starts_with([' ', '\t']) {
        return None;
    }
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Source {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        signed_by: options
            .split_whitespace()
            .find_map(|option| option.strip_prefix("signed-by="))
            .map(str::to_owned),
    })
}

/// `*.sources` (deb822): stanzas of `Field: value`, continued on lines that begin with a blank.
pub fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            sources.extend(stanza(&fields));
            fields.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    sources
}

fn stanza(fields: &[(String, String)]) -> Option<Source> {
    let get = |name: &str| fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str());
    let words =
        |name: &str| get(name).unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let enabled = !get("enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
    let binary = words("types").iter().any(|kind| kind == "deb");
    (enabled && binary && !words("uris").is_empty()).then(|| Source {
        uris: words("uris"),
        suites: words("suites"),
        components: words("components"),
        // A key that is written out in the stanza itself cannot be named in one line; apt's own keys then serve.
        signed_by: get("signed-by")
            .filter(|value| value.starts_with('/') && !value.contains('\n'))
            .map(str::to_owned),
    })
}

/// The archive that the machine's own `codename` is from.
pub fn archive<'a>(sources: &'a [Source], codename: &str) -> Result<&'a Source> {
    let is_it = |source: &&Source| {
        source.suites.iter().any(|suite| suite == codename)
            && source.components.iter().any(|part| part == "main")
    };
    sources.iter().find(is_it).ok_or_else(|| anyhow!("apt's sources name no archive with {codename} main"))
}

/// The line that takes source packages of `release` from the archive that the machine's own `codename` is from.
pub fn source_line(sources: &[Source], codename: &str, release: &str) -> Result<String> {
    let source = archive(sources, codename)?;
    let signed_by = source.signed_by.as_ref().map(|key| format!("[signed-by={key}] ")).unwrap_or_default();
    Ok(format!("deb-src {signed_by}{} {release} main\n", source.uris[0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
# a comment
Types: deb deb-src
# another, within the stanza
URIs: http://archive.test/debian http://other.test/debian
Suites: bookworm
 bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/archive.gpg

Types: deb
URIs: http://archive.test/security
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://off.test/debian
Suites: bookworm
Components: main

Types: deb-src
URIs: http://src.test/debian
Suites: bookworm
Components: main
";

    #[test]
    fn deb822_keeps_enabled_binary_stanzas() {
        let sources = parse_deb822(DEB822);
        assert_eq!(sources.len(), 2, "{sources:?}");
        assert_eq!(sources[0].suites, ["bookworm", "bookworm-updates"]);
        assert_eq!(sources[0].components, ["main", "contrib"]);
        assert_eq!(sources[1].uris, ["http://archive.test/security"]);
    }

    #[test]
    fn deb822_changes_only_the_release() {
        let line = source_line(&parse_deb822(DEB822), "bookworm", "trixie").unwrap();
        assert_eq!(
            line,
            "deb-src [signed-by=/usr/share/keyrings/archive.gpg] http://archive.test/debian trixie main\n"
        );
    }

    #[test]
    fn deb822_key_written_out_is_left_away() {
        let text = "Types: deb\nURIs: http://a.test/d\nSuites: x\nComponents: main\nSigned-By:\n -----BEGIN KEY-----\n .\n abc\n";
        assert_eq!(source_line(&parse_deb822(text), "x", "y").unwrap(), "deb-src http://a.test/d y main\n");
    }

    #[test]
    fn one_line_with_and_without_options() {
        let text = "\
# deb http://no.test/debian bookworm main
deb-src http://src.test/debian bookworm main
deb http://security.test/debian bookworm-security main # trailing
deb [arch=amd64 signed-by=/k.gpg] http://a.test/debian bookworm main non-free
deb\thttp://tab.test/debian\tbookworm\tmain
";
        let sources = parse_one_line(text);
        assert_eq!(sources.len(), 3, "{sources:?}");
        assert_eq!(
            source_line(&sources, "bookworm", "trixie").unwrap(),
            "deb-src [signed-by=/k.gpg] http://a.test/debian trixie main\n"
        );
        assert_eq!(
            source_line(&sources[2..], "bookworm", "trixie").unwrap(),
            "deb-src http://tab.test/debian trixie main\n"
        );
    }

    #[test]
    fn no_archive_of_the_release_is_an_error() {
        let error =
            source_line(&parse_one_line("deb http://a.test/x jammy main"), "bookworm", "trixie").unwrap_err();
        assert!(error.to_string().contains("bookworm"), "{error}");
    }
}
