//! A rank that fails on purpose, so that tests see that the others notice.

use std::str::FromStr;

use longspan::{Engine, Error, Step};

/// Which rank fails, and how.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Fault {
    /// The rank.
    pub rank: u32,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Panic,
    Stop,
}

impl Fault {
    /// Fails, after the group is prepared and while the other ranks run.
    ///
    /// # Errors
    /// Always, unless it panics.
    pub fn strike(self, engine: &dyn Engine) -> longspan::Result<()> {
        match self.kind {
            Kind::Panic => std::panic::panic_any(format!("rank {} was told to panic", self.rank)),
            Kind::Stop => {
                engine.abort();
                let step = Step { phase: "told to stop", index: 0 };
                Err(Error::PeerLost { rank: self.rank, call: "its own run, which was told to stop", step })
            }
        }
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || "it is panic:RANK or stop:RANK".to_owned();
        let (kind, rank) = text.split_once(':').ok_or_else(bad)?;
        let kind = match kind {
            "panic" => Kind::Panic,
            "stop" => Kind::Stop,
            _ => return Err(bad()),
        };
        Ok(Self { rank: rank.parse().map_err(|_| bad())?, kind })
    }
}
