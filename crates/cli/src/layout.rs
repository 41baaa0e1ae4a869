//! `longspan layout`: who holds which tokens, and what each step of the ring computes.

use longspan::{Layout, Mask, Mesh};
use longspan_seqpar::picture::{Balance, holders, steps};

use crate::args::{LayoutArgs, MOST_RANKS};
use crate::failure::{Failure, Result};
use crate::report::say;
use crate::{job, output, picture};

/// Ring ranks whose steps are shown unless one is named.
const RING_RANKS: u32 = 8;

/// Ring ranks up to which the balance is counted: it takes time with the square of their number.
const BALANCED: u32 = 256;

/// Columns, unless the terminal says otherwise.
const WIDTH: usize = 110;

/// Prints the picture, or draws it to a file.
///
/// # Errors
/// [`Failure::Input`] if the cut or the mask does not fit the sequence, or the file can't be written.
pub fn layout(args: &LayoutArgs) -> Result<()> {
    let Some(path) = &args.svg else {
        return say(&text(args, width())?);
    };
    output::check(path, None)?;
    output::write_text(path, &svg(args)?)?;
    say(&format!("Drew the layout to {}\n", path.display()))
}

fn svg(args: &LayoutArgs) -> Result<String> {
    let (layout, mask) = cut(args)?;
    picture::layout::layout(&layout, &mask)
}

/// The layout and the mask; they fit each other.
fn cut(args: &LayoutArgs) -> Result<(Layout, Mask)> {
    let mesh = Mesh::new(args.cut.ulysses, args.cut.ring, args.cut.placement)?;
    job::at_most(MOST_RANKS, &mesh)?;
    let documents = args.cu_seqlens.as_deref();
    let seq = job::tokens(args.seq, documents);
    let mask = job::mask(&args.cut, documents, seq)?;
    mask.check(seq, seq)?;
    Ok((job::layout(args.cut.layout, seq, &mesh), mask))
}

fn text(args: &LayoutArgs, width: usize) -> Result<String> {
    let (layout, mask) = cut(args)?;
    let mesh = layout.mesh();
    let shown = match args.ring_rank {
        Some(ring) if ring >= mesh.ring() => {
            return Err(Failure::Input(format!("--ring-rank {ring}: there are {} ring ranks, from 0", mesh.ring())));
        }
        Some(ring) => ring..ring + 1,
        None => 0..mesh.ring().min(RING_RANKS),
    };
    let mut text = holders(&layout, width);
    let left_out = mesh.ring() - (shown.end - shown.start);
    for ring in shown {
        text.push('\n');
        text.push_str(&steps(&mask, &layout, &layout, ring, width)?);
    }
    if left_out > 0 {
        text.push_str(&format!("\n{left_out} further ring ranks: --ring-rank RANK shows one\n"));
    }
    if mesh.ring() <= BALANCED {
        text.push_str(&format!("\n{}\n", Balance::new(&mask, &layout, &layout)?));
    }
    Ok(text)
}

fn width() -> usize {
    std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok()).unwrap_or(WIDTH).clamp(40, 200)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Args, Command};

    fn shown(words: &str) -> Result<String> {
        let args = Args::try_parse_from(["longspan", "layout"].into_iter().chain(words.split_whitespace()));
        match args.expect("good words").command {
            Command::Layout(args) => text(&args, 80),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_rank_and_every_step_is_shown_within_the_width() {
        let text = shown("--seq 64 --ulysses 2 --ring 2 --layout zigzag --mask causal").expect("fits");
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        for words in ["ring rank 0 of 2", "ring rank 1 of 2", "step 0", "step 1", "largest / mean 1.000"] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }

    #[test]
    fn one_ring_rank_of_many_and_none_that_is_not_there() {
        let text = shown("--seq 4096 --ring 64 --ring-rank 9 --mask window:64").expect("fits");
        assert!(text.contains("63 further ring ranks"), "{text}");
        assert!(shown("--ring 4 --ring-rank 4").is_err());
        assert!(shown("--seq 10 --cu-seqlens 0,5").is_err());
    }

    #[test]
    fn documents_say_how_long_the_sequence_is() {
        let text = shown("--cu-seqlens 0,20,40 --ring 2").expect("fits");
        assert_eq!(text, shown("--seq 40 --cu-seqlens 0,20,40 --ring 2").expect("fits"));
        assert!(shown("--cu-seqlens 0,-40").is_err());
    }
}
