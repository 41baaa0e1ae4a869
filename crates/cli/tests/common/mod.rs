//! Runs the program and makes safetensors files.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use half::f16;
use safetensors::tensor::{Dtype, TensorView, serialize};

/// What the program said, and its exit code.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Runs `longspan` with `args`.
pub fn longspan(args: &[&str]) -> Said {
    said(Command::new(env!("CARGO_BIN_EXE_longspan")).args(args))
}

/// What a command says.
pub fn said(command: &mut Command) -> Said {
    let Output { status, stdout, stderr } = command.output().expect("it starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    Said { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct Raw {
    pub name: &'static str,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Raw {
    /// f16 values between -1 and 1.
    pub fn f16(name: &'static str, shape: &[usize]) -> Self {
        let value = |i: usize| f16::from_f32((i * 7919 % 201) as f32 / 100.0 - 1.0);
        let bytes = (0..shape.iter().product()).flat_map(|i| value(i).to_le_bytes()).collect();
        Self { name, dtype: Dtype::F16, shape: shape.to_vec(), bytes }
    }

    pub fn f32(name: &'static str, shape: &[usize]) -> Self {
        let bytes = (0..shape.iter().product()).flat_map(|i: usize| (i as f32 / 10.0).to_le_bytes()).collect();
        Self { name, dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    pub fn i32(name: &'static str, values: &[i32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { name, dtype: Dtype::I32, shape: vec![values.len()], bytes }
    }
}

/// q, k, v of 2 batch rows, 8 tokens, 4 heads of 2 KV heads of 8.
pub fn good() -> Vec<Raw> {
    vec![Raw::f16("q", &[2, 8, 4, 8]), Raw::f16("k", &[2, 8, 2, 8]), Raw::f16("v", &[2, 8, 2, 8])]
}

/// The tensors of [`good`], with those in `other` in place of their namesakes or added.
pub fn good_but(other: &[Raw]) -> Vec<Raw> {
    let mut tensors: Vec<Raw> = good().into_iter().filter(|t| other.iter().all(|o| o.name != t.name)).collect();
    tensors.extend_from_slice(other);
    tensors
}

pub fn bytes_of(tensors: &[Raw]) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|t| (t.name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).expect("bytes of that shape")));
    serialize(views, None).expect("a valid file")
}

/// A folder with an input file, and the name of an output that is not there.
pub struct Folder {
    folder: tempfile::TempDir,
    pub input: PathBuf,
    pub output: PathBuf,
}

impl Folder {
    pub fn new(input: &[u8]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let (input_path, output) = (path("in.safetensors"), path("out.safetensors"));
        std::fs::write(&input_path, input).expect("writable");
        Self { input: input_path, output, folder }
    }

    /// `longspan run --input IN --output OUT` with `more`.
    pub fn run(&self, more: &[&str]) -> Said {
        let mut args = vec!["run", "--input", text(&self.input), "--output", text(&self.output)];
        args.extend_from_slice(more);
        longspan(&args)
    }

    /// Names of the files in it.
    pub fn files(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.folder.path())
            .expect("readable")
            .map(|entry| entry.expect("readable").file_name().into_string().expect("UTF-8"))
            .collect();
        names.sort();
        names
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}
