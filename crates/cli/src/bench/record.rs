//! The results as data: what the JSON holds. `docs/bench.md` describes every field for readers of the file.

use longspan::Pass;
use serde::{Deserialize, Serialize};

use crate::bench::cases::Case;

/// Name and version of the format. The number grows when a field goes or changes its meaning, not when one is added.
pub const SCHEMA: &str = "longspan-bench/1";

/// A whole run.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// Name and version of the program.
    pub program: String,
    /// Day of the run, `YYYY-MM-DD`, UTC.
    pub date: String,
    /// The host, in one line.
    pub machine: String,
    /// Processes that ran or wanted to on the host before the run, on average over a minute; absent where nobody tells.
    pub load: Option<f64>,
    /// What `--backend` was.
    pub backend: String,
    /// Names of the devices that were used, in order.
    pub devices: Vec<String>,
    /// What `--exchange` was; `default` without it.
    pub exchange: String,
    /// What was computed.
    pub problem: Shape,
    /// Repetitions behind every row.
    pub repeat: u32,
    /// What the devices can do; absent if it could not be measured.
    pub peak: Option<PeakRecord>,
    /// Why there is no peak.
    pub peak_missing: Option<String>,
    /// What was measured.
    pub rows: Vec<Row>,
    /// What was refused or failed.
    pub refused: Vec<Refused>,
}

/// What all rows have in common.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Batch rows.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Size of a query and key head.
    pub head_dim: usize,
    /// Size of a value head.
    pub head_dim_v: usize,
    /// Element type of q, k, v, out and their gradients.
    pub dtype: String,
    /// Which keys a query sees.
    pub mask: String,
    /// Which tokens a block holds.
    pub layout: String,
    /// Which ranks are neighbours.
    pub placement: String,
    /// Head groups of the all-to-all, where they were given.
    pub head_groups: Option<usize>,
    /// Other options that were on, by the names of the command line.
    pub options: Vec<String>,
}

/// The most that the devices do, measured in this run.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PeakRecord {
    /// Floating-point operations per second of each device.
    pub flops_per_second: Vec<f64>,
    /// What was measured.
    pub how: String,
}

/// One case and pass.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Tokens.
    pub seq: usize,
    /// Ranks that share a block.
    pub ulysses: u32,
    /// Blocks.
    pub ring: u32,
    /// Head groups of the all-to-all, given or chosen.
    pub head_groups: usize,
    /// Devices that the ranks were on.
    pub devices: usize,
    /// Whether q, k and v were heads of one tensor.
    pub packed: bool,
    /// `forward`, `backward`, or `step`: one after the other.
    pub pass: String,
    /// Median over the repetitions of the slowest rank's time.
    pub median_s: f64,
    /// Least of these times.
    pub fastest_s: f64,
    /// Largest of these times.
    pub slowest_s: f64,
    /// Floating-point operations of the whole problem, of allowed pairs only.
    pub flops: f64,
    /// `flops / median_s`, of all devices together.
    pub flops_per_second: f64,
    /// `flops_per_second` over the sum of the devices' peaks.
    pub share_of_peak: Option<f64>,
    /// Time of the same work with 1/N of the heads on each of N devices alone, without exchange: median of the slowest
    /// device's, half of them measured before and half after the row's own.
    pub alone_s: Option<f64>,
    /// `alone_s / median_s`: 1 if the exchange costs nothing.
    pub overlap_efficiency: Option<f64>,
    /// Bytes that all ranks sent to others.
    pub sent_bytes: u64,
    /// Time that exchanges took on a rank, on average, also beside compute.
    pub exchange_s: f64,
    /// GB/s that a rank sent while an exchange ran, on average.
    pub exchange_gb_s: Option<f64>,
    /// The most device memory that a rank had at once, tensors included.
    pub peak_bytes: u64,
    /// What that rank's plan and tensors should take.
    pub predicted_bytes: u64,
    /// Names of the kernels.
    pub kernels: Vec<String>,
}

/// A case without figures.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Refused {
    /// Tokens.
    pub seq: usize,
    /// Ranks that share a block.
    pub ulysses: u32,
    /// Blocks.
    pub ring: u32,
    /// Whether q, k and v were heads of one tensor.
    pub packed: bool,
    /// Why.
    pub why: String,
}

impl Refused {
    /// `case`, because of `why`.
    pub fn new(case: &Case, why: String) -> Self {
        let (ulysses, ring) = (case.mesh().ulysses(), case.mesh().ring());
        Self { seq: case.seq(), ulysses, ring, packed: case.packed, why }
    }
}

impl Row {
    /// The mesh, as `2 x 4`.
    pub fn cut(&self) -> String {
        format!("{} x {}", self.ulysses, self.ring)
    }
}

/// The name of a pass in the report.
pub fn name(pass: Pass) -> &'static str {
    match pass {
        Pass::Backward => "backward",
        Pass::Forward => "forward",
        Pass::Step => "step",
    }
}
