//! What one rank will do, worked out without a device: rows, heads, slices, routes and the bytes they move.

use std::ops::Range;

use longspan_hal::{DType, Error, Result, Slice, Spec};

use crate::heads::{HeadCut, head_groups};
use crate::pass::PassLayout;
use crate::rows::{self, Rows};
use crate::{Bytes, Coords, Layout, Mask, Mesh, Needed, Problem, Route, Way};

/// One step of the ring, as one ring rank sees it.
#[derive(Clone, Debug)]
pub(crate) struct Leg {
    /// Ring rank whose block is attended with.
    pub owner: u32,
    /// Rows of that block.
    pub rows: usize,
    /// What this rank attends with, in rows of that block.
    pub needed: Vec<Needed>,
    /// Rows of this rank's own block that ring rank `r + step` needs directly.
    pub asked: Vec<Needed>,
    /// The mask between this rank's queries and that block.
    pub slices: Vec<Slice>,
}

/// The plan of one rank. Pure: no device, no communication; every rank derives its own from the same arguments.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) problem: Problem,
    pub(crate) mesh: Mesh,
    pub(crate) rank: u32,
    pub(crate) at: Coords,
    pub(crate) q: Rows,
    pub(crate) k: Rows,
    pub(crate) mask: Mask,
    pub(crate) cut: HeadCut,
    pub(crate) legs: Vec<Leg>,
}

/// Bytes that one rank sends to another in one exchange.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Traffic {
    /// Which exchange: `gather`, `gather rows` (lse and delta), `give back`, `hop`, `return` (gradients of a ring step),
    /// `share joint`, `share dsinks`.
    pub phase: &'static str,
    /// Its index: head group, or ring step within all head groups.
    pub index: u32,
    /// The receiving rank.
    pub to: u32,
    /// Bytes.
    pub bytes: u64,
}

impl Plan {
    /// Plans `rank` of the layouts' mesh. `q` and `k` are equal for self attention.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the problem, the mask and the layouts do not fit each other, naming what does not.
    pub fn new(problem: &Problem, q: &Layout, k: &Layout, mask: &Mask, rank: u32) -> Result<Self> {
        problem.check()?;
        let mesh = *q.mesh();
        if k.mesh() != &mesh {
            return Err(Error::invalid("layout", "queries and keys have different meshes"));
        }
        if rank >= mesh.size() {
            return Err(Error::invalid("rank", format!("{rank} of {} ranks", mesh.size())));
        }
        mask.check(q.seq(), k.seq())?;
        if problem.joint > 0 && (*mask != Mask::full() || problem.alibi) {
            return Err(Error::invalid(
                "joint",
                "joint tokens have no position: they need the full mask, without documents and ALiBi",
            ));
        }
        let at = mesh.coords(rank);
        let (q, k) =
            (Rows { layout: q.clone(), joint: problem.joint }, Rows { layout: k.clone(), joint: problem.joint });
        let legs = legs(problem, &q, &k, mask, at.ring)?;
        let groups = head_groups(problem, &mesh, [q.layout.seq(), k.layout.seq()], mask);
        Ok(Self {
            problem: problem.clone(),
            mesh,
            rank,
            at,
            q,
            k,
            mask: mask.clone(),
            cut: HeadCut::new(problem, mesh.ulysses(), groups),
            legs,
        })
    }

    /// The problem.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Head groups of the all-to-all, as set in the problem or chosen.
    pub fn head_groups(&self) -> usize {
        self.cut.groups()
    }

    /// The mesh.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// The rank that this plan is for.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Local query and key rows of this rank's shards, joint tokens not counted.
    pub fn local_rows(&self) -> [usize; 2] {
        [self.q.layout.rows(self.rank), self.k.layout.rows(self.rank)]
    }

    /// (query, key) pairs of one head that this rank's ring rank computes.
    pub fn pairs(&self) -> u64 {
        self.legs.iter().flat_map(|l| &l.slices).map(Slice::pairs).sum()
    }

    /// The mask.
    pub fn mask(&self) -> &Mask {
        &self.mask
    }

    /// Bytes of window and buffer that this rank will take: exact. Scratch and work lists of kernels and staging of the collective,
    /// which only a device knows, are added by [`crate::Usp::workspace`].
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn bytes(&self) -> Result<Bytes> {
        let forward = PassLayout::new(self, false)?.bytes;
        let backward = if self.problem.backward { PassLayout::new(self, true)?.bytes } else { Bytes::default() };
        Ok(Bytes::shared(forward, backward))
    }

    /// Every message that this rank sends to another rank in a forward (`backward` false) or backward, in order.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn traffic(&self, backward: bool) -> Result<Vec<Traffic>> {
        Ok(PassLayout::new(self, backward)?.traffic(self.rank))
    }

    /// Whether blocks are gathered in this rank's own memory rather than read from the caller's tensors.
    pub(crate) fn gathers(&self) -> bool {
        self.mesh.ulysses() > 1 || self.problem.joint > 0 || self.cut.replicates()
    }

    /// Whether gradients are accumulated in f32 before they are rounded.
    pub(crate) fn accumulates(&self) -> bool {
        self.mesh.ring() > 1 || self.cut.replicates()
    }

    /// Whether gradients are summed in f32 memory of their own, from which they are rounded once attention is done.
    pub(crate) fn sums_apart(&self) -> bool {
        self.accumulates() && self.problem.dtype != DType::F32
    }

    /// Rows of this rank's query block.
    pub(crate) fn q_block(&self) -> usize {
        self.q.block(self.at.ring)
    }

    /// Rows of this rank's own key block.
    pub(crate) fn k_block(&self) -> usize {
        self.k.block(self.at.ring)
    }

    /// The rank that is `ring` ring ranks ahead, with the same Ulysses rank.
    pub(crate) fn ring_peer(&self, ring: u32) -> u32 {
        self.mesh.rank(Coords { ring: ring % self.mesh.ring(), ulysses: self.at.ulysses })
    }

    /// The next and the previous rank of the ring.
    pub(crate) fn neighbours(&self) -> (u32, u32) {
        (self.ring_peer(self.at.ring + 1), self.ring_peer(self.at.ring + self.mesh.ring() - 1))
    }

    /// Whether direct runs come home before the last step, so that they are added to own gradients that are not whole yet.
    pub(crate) fn comes_home_early(&self) -> bool {
        self.legs.iter().rev().skip(1).any(|leg| !leg.asked.is_empty())
    }

    /// Key rows of the own block with which a ring's backward attends first, and those with which it attends last.
    pub(crate) fn halves(&self) -> [Range<usize>; 2] {
        let (half, all) = (self.k_block() / 2, self.k_block());
        [0..half, half..all]
    }

    /// Rows of its own with which a rank attends last in a forward, where that leaves something for messages to be beside.
    pub(crate) fn own_rows(&self) -> Option<Range<usize>> {
        let own = self.q.segments(self.at)[0].block.clone();
        let apart = self.mesh.ulysses() > 1 && self.mesh.ring() == 1 && self.problem.joint == 0;
        (apart && !own.is_empty() && own.len() < self.q_block()).then_some(own)
    }

    /// The spec of this rank's attention in head group `g` with so many query and key rows.
    pub(crate) fn spec(&self, g: usize, rows: [usize; 2]) -> Spec {
        let q = &self.cut.of(g, self.at.ulysses as usize).q;
        self.problem
            .spec(rows)
            .with_head_cut(q.start, q.len(), self.problem.heads, self.problem.group())
            .with_partial(self.mesh.ring() > 1)
            .with_accumulate(self.problem.backward && self.accumulates())
    }
}

/// The steps of ring rank `r`: from the route, or, with joint tokens, every block hopping whole.
fn legs(problem: &Problem, q: &Rows, k: &Rows, mask: &Mask, r: u32) -> Result<Vec<Leg>> {
    let ring = k.layout.mesh().ring();
    let batch = u32::try_from(problem.batch).map_err(|_| Error::invalid("batch", "it is over 2^32"))?;
    let route = if problem.joint == 0 { Some(Route::new(mask, &q.layout, &k.layout, r)?) } else { None };
    (0..ring)
        .map(|t| {
            let owner = (r + ring - t) % ring;
            let rows = k.block(owner);
            let (needed, asked) = match &route {
                Some(route) => (route.needed(t).to_vec(), if t == 0 { Vec::new() } else { route.asked(t).to_vec() }),
                None if rows == 0 => (Vec::new(), Vec::new()),
                None => (vec![Needed { run: 0, rows: 0..rows, way: Way::Hop }], Vec::new()),
            };
            let slices = rows::slices(mask, q, r, k, owner, batch)?;
            Ok(Leg { owner, rows, needed, asked, slices })
        })
        .collect()
}
