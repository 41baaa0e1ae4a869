//! The command line: what it takes, checked as far as words alone allow.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use longspan::{DType, Mask, Placement};

use crate::fault::Fault;
use crate::synthetic::Shape;

/// The most ranks: what every rank tells every other grows with their square.
pub const MOST_RANKS: u32 = 4096;

/// The most ranks of one process: each has a thread for itself and one for every stream.
pub const MOST_THREADS: u32 = 1024;

/// Exact attention over sequences that do not fit one accelerator.
///
/// The sequence is cut among U x R ranks: U ranks share a block of it by heads (DeepSpeed-Ulysses), R blocks travel round a
/// ring (ring attention). The result is that of plain attention, and --verify shows it.
#[derive(Debug, Parser)]
#[command(
    name = "longspan",
    version,
    max_term_width = 110,
    after_help = "\
Exit codes: 0 ok, 1 failed run, 2 bad usage or input, 3 verification failed.

Start with:
  longspan doctor
  longspan run --synthetic 1,2048,8,2,64 --mask causal --layout zigzag --ring 4 --backward --verify
  longspan layout --seq 64 --ulysses 2 --ring 2 --layout zigzag --mask causal
  longspan bench --seq 4096 --sweep S --html bench.html

Ranks are threads, or with a backend such as mpi the processes that a launcher started:
  mpirun -n 4 longspan run --backend mpi --synthetic 1,2048,8,2,64 --ulysses 2 --ring 2 --verify"
)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Measure speed, exchange, overlap and memory of attention over ranks
    Bench(Box<Bench>),
    /// Show or clear the kernels that were compiled on this machine
    Cache(CacheArgs),
    /// Judge a backend: run the conformance suite on it
    Conformance(Conformance),
    /// Show what is on this machine, what is missing, and how to get it
    Doctor(DoctorArgs),
    /// Show who holds which tokens and what each step of the ring computes
    Layout(LayoutArgs),
    /// Run attention over ranks, forward and backward, and verify the result
    Run(Box<Run>),
    /// Keep the board of a job whose ranks are processes; process 0 starts it by itself
    #[command(hide = true)]
    Witness {
        /// Ranks are on other hosts too
        #[arg(long)]
        network: bool,
    },
}

/// `longspan run`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Input file (safetensors): q [batch, seq, heads, head_dim], k and v [batch, seq, kv_heads, head_dim], in bf16, f16 or f32.
Optional: dout (as out), sinks and alibi_slopes (f32, one per head; their presence turns the option on),
cu_seqlens (i32: starts of packed documents and the end of the last; for every batch row).
Output file: out, lse [batch, heads, seq] in f32, and with --backward dq, dk, dv, dsinks.
With --verify, no file (--output, --trace, --timeline) is written unless the results are within the bound.")]
pub struct Run {
    /// Where q, k and v come from.
    #[command(flatten)]
    pub source: Source,
    /// How the sequence is cut.
    #[command(flatten)]
    pub cut: Cut,
    /// Element type; a file's tensors are rounded to it [default: the file's, f32 for synthetic ones]
    #[arg(long, value_enum, help_heading = "Input")]
    pub dtype: Option<Type>,
    /// Seed of synthetic tensors, of dout and sinks where they are not given, and of dropout
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Input")]
    pub seed: u64,
    /// Which backend computes, of those that `longspan doctor` lists; NAME:0,1 chooses devices
    #[arg(long, default_value = "cpu")]
    pub backend: String,
    /// How messages travel between GPUs [default: what LONGSPAN_EXCHANGE says, else auto]
    #[arg(long, value_enum)]
    pub exchange: Option<Exchange>,
    /// Class of the attention kernels, where the backend has a choice
    #[arg(long, value_enum, value_name = "CLASS")]
    pub kernel: Option<Kernel>,
    /// Compute gradients too (of dout in the file, or of a seeded normal one)
    #[arg(long)]
    pub backward: bool,
    /// Compare every result with plain attention in f64, and fail with exit code 3 outside the bound
    #[arg(long)]
    pub verify: bool,
    /// Write the results to this safetensors file
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Write what every rank did when, for ui.perfetto.dev: a process per rank, a row per stream, arrows for messages
    #[arg(long, value_name = "FILE.json")]
    pub trace: Option<PathBuf>,
    /// Draw what every rank did when
    #[arg(long, value_name = "FILE.svg")]
    pub timeline: Option<PathBuf>,
    /// Give up a wait for another rank after this many seconds
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub limit: u64,
    /// Let a rank fail between forward and backward, to see that it is noticed
    #[arg(long, value_name = "panic:RANK|stop:RANK|wrong:RANK", requires = "backward", hide = true)]
    pub fault: Option<Fault>,
    /// Options of the attention itself.
    #[command(flatten)]
    pub options: Options,
}

/// Where q, k and v come from.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Source {
    /// Read q, k and v from a safetensors file
    #[arg(long, value_name = "FILE", help_heading = "Input")]
    pub input: Option<PathBuf>,
    /// Draw seeded normal q, k and v: batch, tokens, heads, KV heads, head size, value head size
    #[arg(long, value_name = "B,S,H,HK,D[,DV]", help_heading = "Input")]
    pub synthetic: Option<Shape>,
}

/// How the sequence is cut, and which keys a query sees.
#[derive(Clone, Debug, clap::Args)]
pub struct Cut {
    /// Ranks that share a block of the sequence, each with its part of the heads
    #[arg(long, default_value_t = 1, value_name = "U", value_parser = count(), help_heading = "Cut")]
    pub ulysses: u32,
    /// Blocks that the sequence is cut into
    #[arg(long, default_value_t = 1, value_name = "R", value_parser = count(), help_heading = "Cut")]
    pub ring: u32,
    /// Which ranks are neighbours: those that share a block, or those of a ring
    #[arg(long, default_value_t, help_heading = "Cut", value_name = "ulysses-inner|ring-inner")]
    pub placement: Placement,
    /// Which tokens a block holds: one chunk; one from the front and one from the back (balances causal masks); every R-th
    #[arg(long, value_enum, default_value_t, help_heading = "Cut")]
    pub layout: LayoutKind,
    /// Which keys a query sees: window has L keys before it and R behind it (none without R; `all` for every one), prefix the
    /// first P and all before it
    #[arg(long, default_value = "full", value_name = "causal|full|window:L[,R]|prefix:P", help_heading = "Cut")]
    pub mask: Mask,
}

/// Options of the attention itself.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Options of the attention")]
pub struct Options {
    /// Factor on the dot product [default: 1 / sqrt(head_dim)]
    #[arg(long, value_name = "X", value_parser = finite, allow_negative_numbers = true)]
    pub scale: Option<f32>,
    /// Cap logits: X * tanh(logit / X)
    #[arg(long, value_name = "X", value_parser = positive, allow_negative_numbers = true)]
    pub softcap: Option<f32>,
    /// Subtract slope * distance from logits, where slopes are 2^(-8 (h + 1) / heads) unless an input file has some
    #[arg(long)]
    pub alibi: bool,
    /// Add a learned logit per head to the denominator: `run` takes an input file's or seeded normal ones, `bench` zeros
    #[arg(long)]
    pub sinks: bool,
    /// Drop probabilities with this chance, below 1
    #[arg(long, value_name = "P", value_parser = chance, allow_negative_numbers = true)]
    pub dropout: Option<f32>,
    /// Give bitwise equal results in every run
    #[arg(long)]
    pub deterministic: bool,
    /// Cut the heads of a rank into this many groups: one computes while the next travels, and memory falls [default: by shape]
    #[arg(long, value_name = "G", value_parser = count())]
    pub head_groups: Option<u32>,
}

/// `longspan bench`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Numbers are drawn on the way to the device and stay there; a repetition starts with a barrier and takes as long as its slowest
rank. Figures are medians. FLOPs of a forward: 2 (head_dim + head_dim_v) for each query head and each pair of a query and a key
that the mask allows; 2.5 times that for a backward. `of peak` is the share of what the devices themselves were measured to do.
`overlap` is the time of the same work with 1/N of the heads on each of N devices alone, without exchange, over this time.
docs/bench.md describes the JSON.")]
pub struct Bench {
    /// Which backend computes, of those that `longspan doctor` lists; NAME:0,1 chooses devices
    #[arg(long, default_value = "cpu")]
    pub backend: String,
    /// How messages travel between GPUs [default: what LONGSPAN_EXCHANGE says, else auto]
    #[arg(long, value_enum)]
    pub exchange: Option<Exchange>,
    /// Class of the attention kernels, where the backend has a choice
    #[arg(long, value_enum, value_name = "CLASS")]
    pub kernel: Option<Kernel>,
    /// Measure backward, and a step of forward and backward, too
    #[arg(long)]
    pub backward: bool,
    /// Measure q, k and v as heads of one packed tensor too
    #[arg(long)]
    pub packed: bool,
    /// Repetitions, after one that is not counted
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = count())]
    pub repeat: u32,
    /// Give up a wait for another rank or a device after this many seconds
    #[arg(long, default_value_t = 600, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub limit: u64,
    /// Write the results as JSON to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the results as one page with pictures to this file
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Write what every rank did when in the last row, for ui.perfetto.dev, to this file
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// What is computed.
    #[command(flatten)]
    pub shape: BenchShape,
    /// How the sequence is cut.
    #[command(flatten)]
    pub cut: Cut,
    /// Options of the attention itself.
    #[command(flatten)]
    pub options: Options,
}

/// Shapes that `longspan bench` measures.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Shape")]
pub struct BenchShape {
    /// Tokens, one or several
    #[arg(long, default_value = "2048", value_name = "S,...", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..))]
    pub seq: Vec<u64>,
    /// Vary S: from an eighth of the largest --seq by doubling; U, R: 1, 2, 4, ... up to --ulysses, --ring
    #[arg(long, value_enum, ignore_case = true, value_delimiter = ',', value_name = "S,U,R")]
    pub sweep: Vec<Sweep>,
    /// Cut N ranks in every way: all U x R = N
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MOST_THREADS.into()), conflicts_with_all = ["ulysses", "ring"])]
    pub ranks: Option<u32>,
    /// Batch rows
    #[arg(long, default_value_t = 1, value_name = "B", value_parser = count())]
    pub batch: u32,
    /// Query heads
    #[arg(long, default_value_t = 8, value_name = "H", value_parser = count())]
    pub heads: u32,
    /// KV heads [default: as many as query heads]
    #[arg(long, value_name = "HK", value_parser = count())]
    pub kv_heads: Option<u32>,
    /// Size of a query and key head
    #[arg(long, default_value_t = 128, value_name = "D", value_parser = count())]
    pub head_dim: u32,
    /// Size of a value head [default: the same]
    #[arg(long, value_name = "DV", value_parser = count())]
    pub head_dim_v: Option<u32>,
    /// Element type
    #[arg(long, value_enum, default_value_t = Type::Bf16)]
    pub dtype: Type,
}

/// What `longspan bench` varies.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Sweep {
    /// Ring ranks
    R,
    /// Tokens
    S,
    /// Ulysses ranks
    U,
}

/// `longspan cache`.
#[derive(Debug, clap::Args)]
pub struct CacheArgs {
    /// Remove the kernels; they are compiled again when they are needed
    #[arg(long)]
    pub clear: bool,
}

/// `longspan doctor`.
#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Load this backend's libraries in this process and say what was found
    #[arg(long, value_name = "BACKEND", hide = true)]
    pub probe: Option<String>,
}

/// Class of the attention kernels.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Kernel {
    /// The fastest that can do the work
    Auto,
    /// FlashAttention-2 class
    Flash2,
    /// FlashAttention-3 class (Hopper): what it can't do is refused
    Flash3,
}

/// How messages travel between GPUs.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Exchange {
    /// Peer copies where all devices reach each other's memory, else the vendor's library
    Auto,
    /// The vendor's library of collectives: NCCL, or RCCL
    Nccl,
    /// Copies between the devices' memories
    Peer,
}

impl Exchange {
    /// The name that the command line uses.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Nccl => "nccl",
            Self::Peer => "peer",
        }
    }
}

/// `longspan layout`.
#[derive(Debug, clap::Args)]
pub struct LayoutArgs {
    /// Tokens of the sequence [default: the end of the last document, or 64]
    #[arg(long, value_name = "S")]
    pub seq: Option<usize>,
    /// How the sequence is cut.
    #[command(flatten)]
    pub cut: Cut,
    /// Packed documents: their starts and the end of the last, such as 0,20,64
    #[arg(long, value_name = "0,...,S", value_delimiter = ',')]
    pub cu_seqlens: Option<Vec<i32>>,
    /// Show the steps of this ring rank only [default: all, up to 8]
    #[arg(long, value_name = "RANK", conflicts_with = "svg")]
    pub ring_rank: Option<u32>,
    /// Draw it: who holds which tokens, and the mask of every step coloured by ring rank
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// `longspan conformance`.
#[derive(Debug, clap::Args)]
pub struct Conformance {
    /// Which backend is judged, of those that `longspan doctor` lists; NAME:0,1 chooses devices
    #[arg(long, default_value = "cpu")]
    pub backend: String,
    /// How messages travel between GPUs [default: what LONGSPAN_EXCHANGE says, else auto]
    #[arg(long, value_enum)]
    pub exchange: Option<Exchange>,
    /// Class of the attention kernels, where the backend has a choice
    #[arg(long, value_enum, value_name = "CLASS")]
    pub kernel: Option<Kernel>,
    /// How the CPU behaves: it can stand in for the habits of other vendors
    #[arg(long, value_enum, default_value_t)]
    pub personality: Personality,
    /// How much to run
    #[arg(long, value_enum, default_value_t)]
    pub tier: TierArg,
    /// Run only cases whose name contains this
    #[arg(long, value_name = "TEXT")]
    pub filter: Option<String>,
    /// The most ranks that a case may use [default: 8, or as many as there are processes]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub ranks: Option<u32>,
    /// Seed of the cases' random choices
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
    /// Give up a wait for a rank or a stream after this many seconds
    #[arg(long, default_value_t = 20, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub limit: u64,
    /// Write the results as JSON to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Which tokens a block holds.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum LayoutKind {
    /// One chunk of the sequence
    #[default]
    Contiguous,
    /// Every R-th token
    Stripe,
    /// A chunk from the front and one from the back: balances causal masks
    Zigzag,
}

impl LayoutKind {
    /// The name that the command line uses.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Contiguous => "contiguous",
            Self::Stripe => "stripe",
            Self::Zigzag => "zigzag",
        }
    }
}

/// How the CPU backend behaves.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum Personality {
    /// Results in the I/O dtype, no partials in the fused kernel, blocking rendezvous
    AscendLike,
    /// Plain, with every access checked for a missing order between streams and ranks
    Checked,
    /// Packs what it sends, arrives late
    NcclLike,
    /// As `longspan run` uses it
    #[default]
    Plain,
    /// Senders write into the receivers' windows, memory is freed late
    Push,
}

/// How much of the suite runs.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum TierArg {
    /// Everything
    Full,
    /// What CI runs
    #[default]
    Quick,
}

/// Element types by the names of the command line.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Type {
    /// bfloat16
    Bf16,
    /// IEEE binary16
    F16,
    /// IEEE binary32
    F32,
}

impl From<Type> for DType {
    fn from(name: Type) -> Self {
        match name {
            Type::Bf16 => Self::Bf16,
            Type::F16 => Self::F16,
            Type::F32 => Self::F32,
        }
    }
}

fn count() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..)
}

fn number(text: &str) -> Result<f32, String> {
    text.parse::<f32>().map_err(|_| "it is not a number".to_owned())
}

fn finite(text: &str) -> Result<f32, String> {
    number(text).and_then(|x| if x.is_finite() { Ok(x) } else { Err("it must be finite".to_owned()) })
}

fn positive(text: &str) -> Result<f32, String> {
    finite(text).and_then(|x| if x > 0.0 { Ok(x) } else { Err("it must be above 0".to_owned()) })
}

fn chance(text: &str) -> Result<f32, String> {
    number(text).and_then(|p| if (0.0..1.0).contains(&p) { Ok(p) } else { Err("it must be in [0, 1)".to_owned()) })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
    }

    #[test]
    fn numbers_are_bounded() {
        assert!(chance("0").is_ok() && chance("0.999").is_ok());
        assert!(chance("1").is_err() && chance("-0.1").is_err() && chance("NaN").is_err());
        assert!(positive("0").is_err() && positive("inf").is_err() && positive("30").is_ok());
        assert!(finite("-2").is_ok() && finite("inf").is_err() && finite("x").is_err());
    }
}
