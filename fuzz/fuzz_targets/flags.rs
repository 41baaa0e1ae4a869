//! Any words on the command line: a job that fits together, a picture, or a refusal.
#![no_main]

use clap::Parser;
use libfuzzer_sys::fuzz_target;
use longspan::Mesh;
use longspan_fuzz::args::{Args, Command};
use longspan_fuzz::failure::Failure;
use longspan_fuzz::{job, picture};
use longspan_seqpar::picture::holders;

/// Elements that a drawn tensor may have here: the parser takes any number, and drawing them is not what is tested.
const ELEMENTS: usize = 1 << 12;

fuzz_target!(|text: &str| {
    let Ok(args) = Args::try_parse_from(["longspan"].into_iter().chain(text.split_whitespace())) else { return };
    match args.command {
        Command::Layout(args) => {
            let Ok(mesh) = Mesh::new(args.cut.ulysses, args.cut.ring, args.cut.placement) else { return };
            let seq = job::tokens(args.seq, args.cu_seqlens.as_deref());
            if mesh.size() > 32 || seq > 1 << 40 {
                return;
            }
            let layout = job::layout(args.cut.layout, seq, &mesh);
            let Ok(mask) = job::mask(&args.cut, args.cu_seqlens.as_deref(), seq) else { return };
            assert!(holders(&layout, 100).lines().all(|line| line.len() <= 100));
            match picture::layout::layout(&layout, &mask) {
                Ok(svg) => assert!(svg.ends_with("</svg>\n") && svg.len() < 8 << 20, "{}", svg.len()),
                Err(failure) => assert!(matches!(failure, Failure::Input(_)), "{failure}"),
            }
        }
        Command::Run(mut run) => {
            // The file system is not tested here.
            run.source.input = None;
            let Some(shape) = &run.source.synthetic else { return };
            let drawn = [shape.batch, shape.seq, shape.heads, shape.head_dim.max(shape.head_dim_v)];
            if drawn.into_iter().try_fold(1usize, usize::checked_mul).is_none_or(|n| n > ELEMENTS) {
                return;
            }
            if run.cut.ulysses.saturating_mul(run.cut.ring) > 1 << 12 {
                return;
            }
            match job::Job::new(&run) {
                Ok(job) => assert_eq!(job.q.extent()[1], job.q_layout.seq()),
                Err(failure) => assert!(matches!(failure, Failure::Input(_)), "{failure}"),
            }
        }
        _ => {}
    }
});
