//! What a backend is known not to do: two lists, in TOML, with reasons.
//!
//! ```toml
//! [[never]]                       # refused on purpose; the refusal itself is tested
//! pattern = "attention/*-partial*"
//! why = "its fused kernel writes out in the I/O dtype only"
//!
//! [[broken]]                      # a known fault; the run fails when it goes away
//! pattern = "collective/all-to-all-8"
//! why = "driver bug"
//! link = "https://..."
//!
//! [sharing]                       # several ranks on one device may be refused: by one of its ways to exchange, say
//! why = "NCCL needs a device for each rank"
//! ```
//!
//! A pattern matches whole case names; `*` stands for any text. A pattern that matches no case of the table fails the run.

use longspan_hal::{Error, Result};
use serde::Deserialize;

/// The lists of the backends of this workspace, by [`longspan_hal::Backend::NAME`].
const BUILT_IN: &[(&str, &str)] = &[
    ("ascend", include_str!("../expectations/ascend.toml")),
    ("ascend-fused", include_str!("../expectations/ascend-fused.toml")),
    ("cpu", include_str!("../expectations/cpu.toml")),
    ("cpu-ascend-like", include_str!("../expectations/cpu-ascend-like.toml")),
    ("cpu-checked", include_str!("../expectations/cpu-checked.toml")),
    ("cpu-nccl-like", include_str!("../expectations/cpu-nccl-like.toml")),
    ("cpu-push", include_str!("../expectations/cpu-push.toml")),
    ("cuda", include_str!("../expectations/cuda.toml")),
    ("rocm", include_str!("../expectations/rocm.toml")),
    ("mpi", include_str!("../expectations/mpi.toml")),
];

/// The TOML text for a backend of this workspace; empty for others.
pub fn built_in(backend: &str) -> &'static str {
    BUILT_IN.iter().find(|(name, _)| *name == backend).map_or("", |(_, text)| text)
}

/// What a backend is known not to do.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expectations {
    /// Cases that are known to fail.
    #[serde(default)]
    pub broken: Vec<Broken>,
    /// Cases that are refused on purpose.
    #[serde(default)]
    pub never: Vec<Never>,
    /// Whether a group with several ranks on a device may be refused.
    pub sharing: Option<Sharing>,
}

/// Why several ranks on one device may be refused.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sharing {
    /// Why.
    pub why: String,
}

/// A known fault.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Broken {
    /// Which cases.
    pub pattern: String,
    /// What is wrong.
    pub why: String,
    /// Where it is tracked.
    pub link: String,
}

/// Something that the backend does not do.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Never {
    /// Which cases.
    pub pattern: String,
    /// Why not.
    pub why: String,
}

/// What is expected of one case.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Expected<'a> {
    /// To fail, because of this.
    Broken(&'a str),
    /// To be refused, because of this.
    Never(&'a str),
    /// To pass.
    Pass,
}

impl Expectations {
    /// Reads the TOML text.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the place of a syntax error, for an unknown key, or for an empty reason or link.
    pub fn parse(text: &str) -> Result<Self> {
        let this: Self = toml::from_str(text).map_err(|e| Error::invalid("expectations", e.to_string()))?;
        if this.sharing.as_ref().is_some_and(|s| s.why.trim().is_empty()) {
            return Err(Error::invalid("expectations", "`sharing` needs a reason"));
        }
        let reasons = this.never.iter().map(|n| (&n.pattern, &n.why, None));
        for (pattern, why, link) in reasons.chain(this.broken.iter().map(|b| (&b.pattern, &b.why, Some(&b.link)))) {
            if why.trim().is_empty() || link.is_some_and(|l| l.trim().is_empty()) {
                return Err(Error::invalid("expectations", format!("`{pattern}` needs a reason (and a fault a link)")));
            }
        }
        Ok(this)
    }

    /// What is expected of the case `name`. `never` comes first.
    pub fn of(&self, name: &str) -> Expected<'_> {
        if let Some(never) = self.never.iter().find(|n| matches(&n.pattern, name)) {
            return Expected::Never(&never.why);
        }
        self.broken.iter().find(|b| matches(&b.pattern, name)).map_or(Expected::Pass, |b| Expected::Broken(&b.why))
    }

    /// Patterns that match none of `names`.
    pub fn idle<'a>(&'a self, names: &[&str]) -> Vec<&'a str> {
        let patterns = self.never.iter().map(|n| &n.pattern).chain(self.broken.iter().map(|b| &b.pattern));
        patterns.map(String::as_str).filter(|p| !names.iter().any(|n| matches(p, n))).collect()
    }
}

/// Whether `pattern`, in which `*` stands for any text, matches the whole of `name`.
pub fn matches(pattern: &str, name: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(name) = name.strip_prefix(head) else {
        return false;
    };
    (0..=name.len()).filter(|&i| name.is_char_boundary(i)).any(|i| matches(rest, &name[i..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_match_any_text() {
        for (pattern, name, yes) in [
            ("a/b", "a/b", true),
            ("a/b", "a/bc", false),
            ("a/*", "a/", true),
            ("*bf16*partial", "x-bf16-y-partial", true),
            ("*bf16*partial", "x-partial-bf16", false),
            ("*", "", true),
        ] {
            assert_eq!(matches(pattern, name), yes, "{pattern} {name}");
        }
    }

    #[test]
    fn the_built_in_lists_can_be_read() {
        for (name, text) in BUILT_IN {
            Expectations::parse(text).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }

    #[test]
    fn lists_without_reasons_and_with_unknown_keys_are_refused() {
        assert!(Expectations::parse("[[never]]\npattern = 'x'\nwhy = ' '").is_err());
        assert!(Expectations::parse("[[broken]]\npattern = 'x'\nwhy = 'y'").is_err());
        assert!(Expectations::parse("[sharing]\nwhy = ''").is_err());
        assert!(Expectations::parse("[sharing]\nwhy = 'x'").is_ok_and(|e| e.sharing.is_some()));
        assert!(Expectations::parse("[[sometimes]]\npattern = 'x'").is_err());
    }

    #[test]
    fn patterns_that_match_nothing_are_found() {
        let e = Expectations::parse("[[never]]\npattern = 'a/*'\nwhy = 'y'\n[[never]]\npattern = 'b'\nwhy = 'y'");
        let e = e.expect("correct");
        assert_eq!(e.idle(&["a/1", "c"]), ["b"]);
        assert_eq!(e.of("a/1"), Expected::Never("y"));
        assert_eq!(e.of("c"), Expected::Pass);
    }
}
