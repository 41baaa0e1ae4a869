//! A rank that fails on purpose, so that tests see that the others, or the verification, notice.

use std::str::FromStr;

use longspan::{Engine, Error, Forwarded, Step, Tensor};

/// Which rank fails, and how.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Fault {
    rank: u32,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Panic,
    Stop,
    Wrong,
}

impl Fault {
    /// Strikes if this is the rank: between forward and backward, while the other ranks go on.
    ///
    /// # Errors
    /// When the rank is told to stop. It may also panic, which is what is asked for.
    pub fn strike(self, engine: &dyn Engine, forward: &mut Forwarded) -> longspan::Result<()> {
        if self.rank != engine.rank() {
            return Ok(());
        }
        match self.kind {
            Kind::Panic => std::panic::panic_any(format!("rank {} was told to panic", self.rank)),
            Kind::Stop => {
                engine.abort();
                let step = Step { phase: "told to stop", index: 0 };
                Err(Error::PeerLost { rank: self.rank, call: "its own run, which was told to stop", step, late: None })
            }
            Kind::Wrong => {
                let mut values = forward.out.to_f32();
                values.first_mut().into_iter().for_each(|value| *value += 0.125);
                forward.out = Tensor::from_f32(forward.out.dtype(), forward.out.extent(), &values)?;
                Ok(())
            }
        }
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || "it is panic:RANK, stop:RANK or wrong:RANK".to_owned();
        let (kind, rank) = text.split_once(':').ok_or_else(bad)?;
        let kind = match kind {
            "panic" => Kind::Panic,
            "stop" => Kind::Stop,
            "wrong" => Kind::Wrong,
            _ => return Err(bad()),
        };
        Ok(Self { rank: rank.parse().map_err(|_| bad())?, kind })
    }
}
