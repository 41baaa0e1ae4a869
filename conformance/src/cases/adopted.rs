//! Attention as a framework runs it: on memory and a stream that somebody else made. What a backend's own tests lend is theirs.

use std::any::Any;
use std::sync::Arc;

use longspan_hal::{Backend, DType, Error};
use longspan_seqpar::{Layout, Mask, Mesh, Placement, Problem};

use super::Case;
use super::parallel::{Setup, run};
use super::problem::Memory;
use crate::rank::{Failure, Lend, Rank, Stream};

/// A stream of the rank's device that somebody else made, adopted, and what keeps it alive.
pub type LendStream<B> = Arc<dyn Fn(&Rank<B>) -> Result<(Stream<B>, Box<dyn Any>), Error> + Send + Sync>;

/// The cases of this file. No `stream` where streams have no foreign form.
pub fn cases<B: Backend>(memory: &Lend<B>, stream: Option<&LendStream<B>>) -> Vec<Case<B>> {
    let mut cases = Vec::new();
    for (u, r, dtype, words) in
        [(1, 2, DType::Bf16, "-partial"), (2, 1, DType::Bf16, ""), (2, 2, DType::F32, "-partial")]
    {
        let (memory, stream) = (memory.clone(), stream.cloned());
        cases.push(Case::new(format!("adopted/u{u}r{r}-{dtype}{words}"), u * r, move |rank| {
            let problem = Problem::new(dtype, 2, [4, 2], 16).with_sinks(true);
            let layout = Layout::zigzag(53, &Mesh::new(u, r, Placement::UlyssesInner)?);
            let setup = Setup { memory: Memory::Random, ..Setup::new(problem, layout, Mask::causal()) };
            on_loan(rank, &setup, &memory, stream.as_ref())
        }));
    }
    cases
}

/// A whole run of which every tensor, the workspace and the stream are lent.
fn on_loan<B: Backend>(
    rank: &mut Rank<B>,
    setup: &Setup,
    memory: &Lend<B>,
    stream: Option<&LendStream<B>>,
) -> Result<(), Failure> {
    let lent = stream.map(|lend| lend(rank)).transpose()?;
    let (stream, alive) = lent.map_or((None, None), |(stream, alive)| (Some(stream), Some(alive)));
    let own = stream.map(|stream| std::mem::replace(&mut rank.stream, stream));
    rank.lend = Some(memory.clone());
    let result = run(rank, setup);
    rank.lend = None;
    if let Some(own) = own {
        rank.stream = own;
    }
    drop(alive);
    result
}
