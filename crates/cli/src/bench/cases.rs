//! What is measured: lengths x meshes x packings.

use std::iter::successors;

use longspan::{Layout, Mask, Mesh, Placement, Problem};

use crate::args::{Bench, MOST_THREADS, Sweep};
use crate::failure::{Failure, Result};
use crate::job;

/// One thing to measure.
#[derive(Clone, Debug)]
pub struct Case {
    /// The whole problem.
    pub problem: Problem,
    /// Which rank holds which token.
    pub layout: Layout,
    /// Which keys a query sees.
    pub mask: Mask,
    /// Whether q, k and v are heads of one tensor.
    pub packed: bool,
}

impl Case {
    /// Tokens.
    pub fn seq(&self) -> usize {
        self.layout.seq()
    }

    /// The mesh.
    pub fn mesh(&self) -> &Mesh {
        self.layout.mesh()
    }

    /// What one of `devices` devices has to do alone for all of them to be done: all tokens, its share of the heads, one rank.
    /// Nothing if the heads have no such share.
    pub fn alone(&self, devices: usize) -> Option<Self> {
        let Problem { heads, kv_heads, .. } = self.problem;
        let kv = match kv_heads {
            kv if kv.is_multiple_of(devices) => kv / devices,
            kv if devices.is_multiple_of(kv) => 1,
            _ => return None,
        };
        if !heads.is_multiple_of(devices) {
            return None;
        }
        let mut problem = self.problem.clone().with_head_groups(1);
        (problem.heads, problem.kv_heads) = (heads / devices, kv);
        let mesh = Mesh::new(1, 1, Placement::default()).ok()?;
        Some(Self { problem, layout: Layout::contiguous(self.seq(), &mesh), ..self.clone() })
    }
}

/// The cases in the order of the report: lengths, then Ulysses sizes, then ring sizes, then packings.
///
/// # Errors
/// [`Failure::Input`] for a shape that does not fit itself.
pub fn list(args: &Bench) -> Result<Vec<Case>> {
    let varies = |what| args.shape.sweep.contains(&what);
    let lengths: Vec<usize> = match args.shape.seq.iter().max() {
        Some(&most) if varies(Sweep::S) => doubling((most / 8).max(1), most).collect(),
        _ => args.shape.seq.clone(),
    }
    .into_iter()
    .map(|seq| usize::try_from(seq).map_err(|_| Failure::input("--seq", format!("{seq} is too long for this machine"))))
    .collect::<Result<_>>()?;
    if args.shape.ranks.is_some() && (varies(Sweep::U) || varies(Sweep::R)) {
        return Err(Failure::Input("--ranks takes every U and R already: leave them out of --sweep".into()));
    }
    let problem = problem(args)?;
    let mut cases = Vec::new();
    for &seq in &lengths {
        for (ulysses, ring) in cuts(args) {
            let mesh = Mesh::new(ulysses, ring, args.cut.placement)?;
            job::at_most(MOST_THREADS, &mesh)?;
            let mask = job::mask(&args.cut, None, seq)?;
            mask.check(seq, seq)?;
            let layout = job::layout(args.cut.layout, seq, &mesh);
            for packed in [false, true].into_iter().take(if args.packed { 2 } else { 1 }) {
                let (problem, layout, mask) = (problem.clone(), layout.clone(), mask.clone());
                cases.push(Case { problem, layout, mask, packed });
            }
        }
    }
    Ok(cases)
}

/// Ulysses and ring sizes.
fn cuts(args: &Bench) -> Vec<(u32, u32)> {
    if let Some(ranks) = args.shape.ranks {
        return (1..=ranks).filter(|u| ranks.is_multiple_of(*u)).map(|u| (u, ranks / u)).collect();
    }
    let sizes = |most: u32, what| match args.shape.sweep.contains(&what) {
        true => doubling(1, most.into()).map(|n| n as u32).collect(), // none is above `most`
        false => vec![most],
    };
    let (ulysses, ring) = (sizes(args.cut.ulysses, Sweep::U), sizes(args.cut.ring, Sweep::R));
    ulysses.into_iter().flat_map(|u| ring.iter().map(move |r| (u, *r))).collect()
}

fn problem(args: &Bench) -> Result<Problem> {
    let (shape, options) = (&args.shape, &args.options);
    let (heads, dim) = (shape.heads as usize, shape.head_dim as usize);
    let problem = Problem::new(
        shape.dtype.into(),
        shape.batch as usize,
        [heads, shape.kv_heads.map_or(heads, |n| n as usize)],
        dim,
    )
    .with_head_dim_v(shape.head_dim_v.map_or(dim, |n| n as usize))
    .with_scale(options.scale.unwrap_or_else(|| 1.0 / (dim as f32).sqrt()))
    .with_softcap(options.softcap)
    .with_alibi(options.alibi)
    .with_sinks(options.sinks)
    .with_dropout(options.dropout)
    .with_deterministic(options.deterministic)
    .with_head_groups(options.head_groups.map(|n| n as usize))
    .with_backward(args.backward);
    problem.check()?;
    if args.packed && problem.head_dim != problem.head_dim_v {
        return Err(Failure::Input("--packed: q, k and v in one tensor need heads of one size".into()));
    }
    Ok(problem)
}

/// `first`, twice that, and so on, and `last`, which is no less.
fn doubling(first: u64, last: u64) -> impl Iterator<Item = u64> {
    successors(Some(first), |n| n.checked_mul(2)).take_while(move |&n| n < last).chain([last])
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Args, Command};

    fn cases(words: &str) -> Result<Vec<Case>> {
        let args = Args::try_parse_from(["longspan", "bench"].into_iter().chain(words.split_whitespace()));
        match args.expect("good words").command {
            Command::Bench(args) => list(&args),
            other => panic!("{other:?}"),
        }
    }

    fn shapes(words: &str) -> Vec<(usize, u32, u32)> {
        let of = |c: &Case| (c.seq(), c.mesh().ulysses(), c.mesh().ring());
        cases(words).expect("fits").iter().map(of).collect()
    }

    #[test]
    fn sizes_double_and_end_with_the_last() {
        let all = |first, last| doubling(first, last).collect::<Vec<_>>();
        assert_eq!(all(1, 1), [1]);
        assert_eq!(all(1, 8), [1, 2, 4, 8]);
        assert_eq!(all(1, 6), [1, 2, 4, 6]);
        assert_eq!(all(512, 4096), [512, 1024, 2048, 4096]);
        assert_eq!(all(1, u64::from(u32::MAX)).len(), 33);
        assert_eq!(all(u64::MAX / 8, u64::MAX).len(), 5);
    }

    #[test]
    fn sweeps_multiply() {
        assert_eq!(shapes("--seq 64,32 --ring 2"), [(64, 1, 2), (32, 1, 2)]);
        assert_eq!(shapes("--seq 64 --sweep S"), [(8, 1, 1), (16, 1, 1), (32, 1, 1), (64, 1, 1)]);
        assert_eq!(shapes("--seq 64 --sweep U,R --ulysses 2 --ring 2").len(), 4);
        assert_eq!(shapes("--seq 64 --ranks 6"), [(64, 1, 6), (64, 2, 3), (64, 3, 2), (64, 6, 1)]);
        assert_eq!(shapes("--seq 64 --sweep s,u,r --ulysses 4 --ring 3 --packed").len(), 4 * 3 * 3 * 2);
    }

    #[test]
    fn a_share_of_the_heads_keeps_the_group_or_is_none() {
        let share = |heads: &str, devices| {
            let case = &cases(&format!("--seq 64 --ring 2 {heads}")).expect("fits")[0];
            case.alone(devices).map(|c| (c.problem.heads, c.problem.kv_heads, c.mesh().size()))
        };
        assert_eq!(share("--heads 32 --kv-heads 8", 2), Some((16, 4, 1)));
        assert_eq!(share("--heads 32 --kv-heads 8", 1), Some((32, 8, 1)));
        assert_eq!(share("--heads 8 --kv-heads 2", 4), Some((2, 1, 1)));
        assert_eq!(share("--heads 12", 8), None);
        assert_eq!(share("--heads 12 --kv-heads 3", 2), None);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        for bad in [
            "--ranks 4 --sweep R",
            "--heads 5 --kv-heads 2",
            "--packed --head-dim 64 --head-dim-v 32",
            "--dropout 0.5 --mask prefix:9999",
        ] {
            assert!(matches!(cases(bad), Err(Failure::Input(_))) || bad.contains("prefix"), "{bad}");
        }
    }
}
