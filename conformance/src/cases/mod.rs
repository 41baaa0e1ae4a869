//! The table of cases: data, one row a case.

use std::sync::Arc;

use longspan_hal::Backend;

use crate::rank::{Failure, Rank};

pub mod adopted;
pub mod agreement;
pub mod attention;
pub mod collective;
pub mod device;
pub mod engine;
pub mod exchange;
pub mod kernels;
pub mod pairwise;
pub mod parallel;
pub mod problem;
pub mod seqpar;
pub mod slices;
pub mod stream;
pub mod view;

/// What every rank runs.
pub type Body<B> = Arc<dyn Fn(&mut Rank<B>) -> Result<(), Failure> + Send + Sync>;

/// How much is run.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Tier {
    /// Everything, minutes to hours.
    Full,
    /// What fits continuous integration.
    #[default]
    Quick,
}

impl Tier {
    /// `full` or `quick`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Quick => "quick",
        }
    }
}

/// One row of the table.
pub struct Case<B: Backend> {
    /// `group/what-with-which-options`; expectation patterns match it.
    pub name: String,
    /// Number of ranks.
    pub ranks: u32,
    /// The smallest tier that runs it.
    pub tier: Tier,
    /// What every rank runs.
    pub body: Body<B>,
    /// Its configuration in words, for the report.
    pub config: String,
    /// Whether it leaves a group that can't be used again.
    pub spends_team: bool,
}

impl<B: Backend> Clone for Case<B> {
    fn clone(&self) -> Self {
        let Self { name, ranks, tier, body, config, spends_team } = self;
        Self {
            name: name.clone(),
            ranks: *ranks,
            tier: *tier,
            body: body.clone(),
            config: config.clone(),
            spends_team: *spends_team,
        }
    }
}

impl<B: Backend> std::fmt::Debug for Case<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Case").field("name", &self.name).field("ranks", &self.ranks).finish_non_exhaustive()
    }
}

impl<B: Backend> Case<B> {
    /// A case of the quick tier.
    pub fn new(
        name: impl Into<String>,
        ranks: u32,
        body: impl Fn(&mut Rank<B>) -> Result<(), Failure> + Send + Sync + 'static,
    ) -> Self {
        let (name, body) = (name.into(), Arc::new(body));
        Self { name, ranks, tier: Tier::Quick, body, config: String::new(), spends_team: false }
    }

    /// Moves the case to the full tier.
    #[must_use]
    pub fn full(mut self) -> Self {
        self.tier = Tier::Full;
        self
    }

    /// Says what the configuration is.
    #[must_use]
    pub fn with_config(mut self, config: impl Into<String>) -> Self {
        self.config = config.into();
        self
    }

    /// Says that the group is gone afterwards.
    #[must_use]
    pub fn spends_team(mut self) -> Self {
        self.spends_team = true;
        self
    }
}

/// Every case of both tiers; those of the facade where it knows a backend `name`. `seed` chooses the configurations of the
/// sweeps; names of sweeps name their options. `processes`: whether every rank is a process of its own.
pub fn table<B: Backend>(name: &str, seed: u64, processes: bool) -> Vec<Case<B>> {
    let mut cases = Vec::new();
    cases.extend(device::cases());
    cases.extend(stream::cases());
    cases.extend(view::cases());
    cases.extend(collective::cases());
    cases.extend(attention::cases(seed));
    cases.extend(seqpar::cases(seed));
    if longspan::backends().contains(&name) {
        cases.extend(engine::cases(name, processes));
    }
    cases
}
