//! The one error type of the workspace. Every message says what happened and what to do next.

use std::time::Duration;

use crate::Step;

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, from bad input to a lost peer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A vendor library call failed.
    #[error("{backend}: {call} failed with code {code}: {message}")]
    Driver {
        /// Name of the backend, such as `cuda`.
        backend: &'static str,
        /// The library function that failed.
        call: &'static str,
        /// The library's own code.
        code: i64,
        /// The library's own text, with what to do where that is known.
        message: String,
    },

    /// An argument is wrong; nothing was started.
    #[error("invalid {what}: {why}")]
    Invalid {
        /// The argument.
        what: &'static str,
        /// What is wrong with it, and what would be right.
        why: String,
    },

    /// The device has not enough memory; nothing was started.
    #[error("out of memory: {wanted} bytes wanted, {free} bytes free")]
    OutOfMemory {
        /// Bytes that were asked for.
        wanted: u64,
        /// Bytes that the device reported free.
        free: u64,
    },

    /// Another rank died, panicked, was told to stop, or did not come in time; the same on every rank, also on the one that
    /// the others gave up.
    #[error("{}", lost(*rank, call, *step, *late))]
    PeerLost {
        /// The rank that was lost (in its group).
        rank: u32,
        /// The call of this rank that noticed.
        call: &'static str,
        /// The last step that the lost rank reported.
        step: Step,
        /// The limit that passed, where it only did not come: then it may live.
        late: Option<Duration>,
    },

    /// Two operations touched the same memory without an order between them.
    #[error("race: {first} conflicts with {second}; order them with record and wait")]
    Race {
        /// The operation that came first.
        first: String,
        /// The operation that conflicts with it.
        second: String,
    },

    /// A wait ran out.
    #[error("{call} did not finish within {limit:?}; if it only takes longer, raise the limit")]
    Timeout {
        /// The call that waited.
        call: &'static str,
        /// The limit that passed.
        limit: Duration,
    },

    /// A library or device that is needed is not on this machine.
    #[error("{library} is not available: {why}. To get it: {how_to_get_it}")]
    Unavailable {
        /// The library or device.
        library: String,
        /// Why it could not be used.
        why: String,
        /// What the user can do.
        how_to_get_it: String,
    },

    /// A correct request that this backend does not support; nothing was started.
    #[error("{backend} does not support {what}; {instead}")]
    Unsupported {
        /// Name of the backend.
        backend: &'static str,
        /// The option or combination.
        what: String,
        /// What would be supported.
        instead: String,
    },
}

fn lost(rank: u32, call: &str, step: Step, late: Option<Duration>) -> String {
    match late {
        None => format!("lost rank {rank} during {call} (its last reported step: {step})"),
        Some(limit) => format!(
            "rank {rank} was given up during {call}: it did not come within {limit:?} (its last reported step: {step}); if it was \
             only slow, raise the limit"
        ),
    }
}

impl Error {
    /// An [`Error::Invalid`] for `what`, because of `why`.
    pub fn invalid(what: &'static str, why: impl Into<String>) -> Self {
        Self::Invalid { what, why: why.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_rank_and_one_that_was_late_are_told_apart() {
        let step = Step { phase: "attention forward", index: 1 };
        let text = |late| Error::PeerLost { rank: 1, call: "exchange", step, late }.to_string();
        assert_eq!(text(None), "lost rank 1 during exchange (its last reported step: attention forward 1)");
        let late = "rank 1 was given up during exchange: it did not come within 1s (its last reported step: attention forward 1); \
                    if it was only slow, raise the limit";
        assert_eq!(text(Some(Duration::from_secs(1))), late);
    }
}
