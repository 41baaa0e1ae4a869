//! Why the program ends other than well, and its exit code.

use std::fmt::{Display, Formatter};
use std::process::ExitCode;

use longspan_hal::Error;

use crate::report::complain;

/// `Result` with [`Failure`].
pub type Result<T, E = Failure> = std::result::Result<T, E>;

/// Why the program ends other than well.
#[derive(Clone, Debug, PartialEq)]
pub enum Failure {
    /// Bad usage or input; nothing was started and nothing was written. Exit code 2.
    Input(String),
    /// The run failed. Exit code 1.
    Run(String),
    /// It has been said already, here or by process 0 of the job. The exit code is the same.
    Said(u8),
    /// The run ended, but a result is outside its bound. Exit code 3.
    Verification(String),
}

impl Failure {
    /// A [`Failure::Input`] about `what`.
    pub fn input(what: impl Display, why: impl Display) -> Self {
        Self::Input(format!("{what}: {why}"))
    }

    /// A [`Failure::Run`] because of `why`.
    pub fn run(why: impl Display) -> Self {
        Self::Run(why.to_string())
    }

    /// Says it on stderr, unless it has been said.
    pub fn print(&self) {
        if !matches!(self, Self::Said(_)) {
            complain(format_args!("error: {self}"));
        }
    }

    /// The exit code: 1 failed run, 2 bad usage or input, 3 verification failed.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code())
    }

    /// The exit code as a number.
    pub fn code(&self) -> u8 {
        match self {
            Self::Run(_) => 1,
            Self::Input(_) => 2,
            Self::Verification(_) => 3,
            Self::Said(code) => *code,
        }
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Input(why) | Self::Run(why) => f.write_str(why),
            Self::Said(_) => f.write_str("said already"),
            Self::Verification(why) => write!(f, "verification failed: {why}"),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid { .. } | Error::Unavailable { .. } | Error::Unsupported { .. } => {
                Self::Input(error.to_string())
            }
            other => Self::Run(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_bad_input_and_a_lost_peer_is_a_failed_run() {
        assert!(matches!(Failure::from(Error::invalid("x", "y")), Failure::Input(_)));
        let lost = Error::PeerLost { rank: 3, call: "exchange", step: longspan_hal::Step::default(), late: None };
        assert!(matches!(Failure::from(lost), Failure::Run(why) if why.contains("rank 3")));
    }
}
