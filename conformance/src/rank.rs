//! What a case sees: one rank with its device, group, attention and stream, and helpers to make and read tensors.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use longspan_hal::{Backend, Collective, DType, Device, DeviceInfo, Error, Extent, Step, Strided, View, ViewMut};
use longspan_seqpar::Member;
use ndarray::Array4;

use crate::gather::{Gather, Shares};
use crate::host::{self, Random};

/// Buffer of a backend.
pub type Buffer<B> = <<B as Backend>::Device as Device>::Buffer;
/// Stream of a backend.
pub type Stream<B> = <<B as Backend>::Device as Device>::Stream;

/// Why a case did not pass on a rank.
#[derive(Clone, Debug)]
pub enum Failure {
    /// A call failed that should have worked.
    Error(Error),
    /// Another rank failed first.
    Lost(u32),
    /// The backend refused, rightly: an `Unsupported` error with outputs untouched. The text is the error's.
    Refused(String),
    /// A result or an error is not what it should be.
    Wrong(String),
}

impl Failure {
    /// A [`Failure::Wrong`].
    pub fn wrong(why: impl Into<String>) -> Self {
        Self::Wrong(why.into())
    }

    /// A [`Failure::Lost`].
    pub const fn lost(rank: u32) -> Self {
        Self::Lost(rank)
    }

    /// Whether another rank's failure caused this one.
    pub fn is_consequence(&self) -> bool {
        matches!(self, Self::Lost(_) | Self::Error(Error::PeerLost { .. }))
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Error(error) => error.fmt(f),
            Self::Lost(rank) => write!(f, "rank {rank} failed first"),
            Self::Refused(why) | Self::Wrong(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Failure {}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// [`Failure::Wrong`] unless `ok`.
///
/// # Errors
/// [`Failure::Wrong`] with the text of `why`.
pub fn check(ok: bool, why: impl FnOnce() -> String) -> Result<(), Failure> {
    if ok { Ok(()) } else { Err(Failure::Wrong(why())) }
}

/// Checks that a call was refused with [`Error::Invalid`].
///
/// # Errors
/// [`Failure::Wrong`] if it worked, or failed otherwise.
pub fn check_invalid<T>(what: &str, result: Result<T, Error>) -> Result<(), Failure> {
    match result {
        Err(Error::Invalid { .. }) => Ok(()),
        Err(other) => Err(Failure::wrong(format!("{what}: wanted is an Invalid error, it is: {other}"))),
        Ok(_) => Err(Failure::wrong(format!("{what} was accepted"))),
    }
}

/// Where every rank of a team is: for the watchdog.
#[derive(Debug)]
pub struct Steps(Mutex<Vec<String>>);

impl Steps {
    /// For `size` ranks.
    pub fn new(size: u32) -> Self {
        Self(Mutex::new(vec![String::new(); size as usize]))
    }

    /// Notes a step.
    pub fn set(&self, rank: u32, step: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[rank as usize] = step;
    }

    /// The last step of a rank.
    pub fn of(&self, rank: u32) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[rank as usize].clone()
    }
}

/// A tensor in device memory.
#[derive(Debug)]
pub struct Tensor<B: Backend> {
    /// Its memory; everything outside the tensor holds the poison `0xFF` (a NaN in every dtype).
    pub buffer: Buffer<B>,
    /// Where the elements lie.
    pub at: Strided,
}

impl<B: Backend> Clone for Tensor<B> {
    fn clone(&self) -> Self {
        Self { buffer: self.buffer.clone(), at: self.at }
    }
}

impl<B: Backend> Tensor<B> {
    /// To be read.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it does not fit its buffer.
    pub fn view(&self) -> Result<View<'_, B::Device>, Error> {
        View::new(&self.buffer, self.at)
    }

    /// To be written.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it does not fit its buffer.
    pub fn view_mut(&self) -> Result<ViewMut<'_, B::Device>, Error> {
        ViewMut::new(&self.buffer, self.at)
    }
}

/// One rank of a team. Its device, communicator and attention are those of its [`Member`].
pub struct Rank<B: Backend> {
    /// Its device, communicator and attention.
    pub member: Arc<Member<B>>,
    /// Its main stream.
    pub stream: Stream<B>,
    /// What bounds every wait.
    pub limit: Duration,
    /// The device that it opened.
    pub info: DeviceInfo,
    /// Whether every rank is a process of its own.
    pub processes: bool,
    pub(crate) gather: Arc<dyn Gather>,
    pub(crate) steps: Arc<Steps>,
    pub(crate) seed: u64,
    pub(crate) figures: BTreeMap<String, f64>,
    /// Where memory comes from, if not from the rank's device.
    pub(crate) lend: Option<Lend<B>>,
}

/// Memory of the rank's device that somebody else made, adopted.
pub type Lend<B> = Arc<dyn Fn(&Rank<B>, usize) -> Result<Buffer<B>, Error> + Send + Sync>;

impl<B: Backend> Deref for Rank<B> {
    type Target = Member<B>;

    fn deref(&self) -> &Member<B> {
        &self.member
    }
}

impl<B: Backend> std::fmt::Debug for Rank<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rank").field("rank", &self.index()).field("size", &self.size()).finish_non_exhaustive()
    }
}

impl<B: Backend> Rank<B> {
    /// This rank, from 0.
    pub fn index(&self) -> u32 {
        self.collective.rank()
    }

    /// Number of ranks.
    pub fn size(&self) -> u32 {
        self.collective.size()
    }

    /// Random numbers of this case, the same on every rank.
    pub fn random(&self) -> Random {
        Random::new(self.seed)
    }

    /// Notes where this rank is, for the watchdog and the progress board.
    pub fn step(&self, phase: &'static str, index: u32) {
        self.steps.set(self.index(), format!("{phase} {index}"));
        self.collective.progress(Step { phase, index });
    }

    /// Notes a figure for the report; the largest of all ranks is kept.
    pub fn figure(&mut self, name: impl Into<String>, value: f64) {
        let entry = self.figures.entry(name.into()).or_insert(value);
        *entry = entry.max(value);
    }

    /// Collective: every rank gets every rank's bytes, in rank order.
    ///
    /// # Errors
    /// When a rank failed or does not come.
    pub fn share(&self, bytes: Vec<u8>) -> Result<Shares, Failure> {
        self.steps.set(self.index(), "gather".into());
        self.gather.share(self.index(), bytes, self.limit)
    }

    /// Collective: rank 0 gets every rank's bytes, in rank order.
    ///
    /// # Errors
    /// As [`Rank::share`].
    pub fn gather(&self, bytes: Vec<u8>) -> Result<Option<Shares>, Failure> {
        let all = self.share(bytes)?;
        Ok((self.index() == 0).then_some(all))
    }

    /// Waits for the main stream.
    ///
    /// # Errors
    /// The stream's first error; [`Error::Timeout`].
    pub fn synchronize(&self) -> Result<(), Error> {
        self.device.synchronize(&self.stream, self.limit)
    }

    /// Memory for a case's tensors and workspace.
    ///
    /// # Errors
    /// Those of the device, or of who lends.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer<B>, Error> {
        self.lend.as_ref().map_or_else(|| self.device.alloc(bytes), |lend| lend(self, bytes))
    }

    /// A tensor at `at` in memory of its own, everything poisoned.
    ///
    /// # Errors
    /// Those of the device.
    pub fn blank(&self, at: Strided) -> Result<Tensor<B>, Error> {
        let bytes = (at.byte_range().end + 64).next_multiple_of(4);
        let buffer = self.alloc(bytes)?;
        self.poison(&buffer)?;
        Ok(Tensor { buffer, at })
    }

    /// Writes `0xFF` to all bytes of `buffer` (whose size is even).
    ///
    /// # Errors
    /// Those of the device.
    pub fn poison(&self, buffer: &Buffer<B>) -> Result<(), Error> {
        let bytes = B::Device::bytes(buffer) / 2 * 2;
        let all = Strided::dense(DType::F16, [1, 1, 1, bytes / 2]);
        self.device.upload(&self.stream, &vec![0xFF; bytes], ViewMut::new(buffer, all)?)
    }

    /// A tensor at `at` that holds `values`, with poison around it.
    ///
    /// # Errors
    /// Those of the device.
    pub fn put(&self, at: Strided, values: &Array4<f32>) -> Result<Tensor<B>, Error> {
        let tensor = self.blank(at)?;
        self.write(&tensor, values)?;
        Ok(tensor)
    }

    /// Writes `values` to `tensor`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn write(&self, tensor: &Tensor<B>, values: &Array4<f32>) -> Result<(), Error> {
        let bytes = host::encode(tensor.at.dtype(), values.iter().copied());
        self.device.upload(&self.stream, &bytes, tensor.view_mut()?)
    }

    /// The elements of `tensor` as bytes, after everything queued on the main stream.
    ///
    /// # Errors
    /// Those of the device and the stream.
    pub fn read_bytes(&self, tensor: &Tensor<B>) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; tensor.at.bytes()];
        self.device.download(&self.stream, tensor.view()?, &mut bytes, self.limit)?;
        Ok(bytes)
    }

    /// The values of `tensor`, after everything queued on the main stream.
    ///
    /// # Errors
    /// Those of the device and the stream.
    pub fn read(&self, tensor: &Tensor<B>) -> Result<Array4<f32>, Error> {
        let values = host::decode(tensor.at.dtype(), &self.read_bytes(tensor)?);
        array(tensor.at.extent(), values)
    }

    /// All bytes of `buffer` (whose size is even), after everything queued on the main stream.
    ///
    /// # Errors
    /// Those of the device and the stream.
    pub fn read_all(&self, buffer: &Buffer<B>) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; B::Device::bytes(buffer) / 2 * 2];
        let all = Strided::dense(DType::F16, [1, 1, 1, bytes.len() / 2]);
        self.device.download(&self.stream, View::new(buffer, all)?, &mut bytes, self.limit)?;
        Ok(bytes)
    }

    /// Checks that everything outside `tensor` in its buffer still is poison.
    ///
    /// # Errors
    /// [`Failure::Wrong`] naming the first byte.
    pub fn check_around(&self, what: &str, tensor: &Tensor<B>) -> Result<(), Failure> {
        self.check_outside(what, &tensor.buffer, &[tensor.at])
    }

    /// Checks that everything outside `parts` of `buffer` still is poison.
    ///
    /// # Errors
    /// [`Failure::Wrong`] naming the first byte.
    pub fn check_outside(&self, what: &str, buffer: &Buffer<B>, parts: &[Strided]) -> Result<(), Failure> {
        let mut bytes = self.read_all(buffer)?;
        for at in parts {
            for_each_row(at, |row| bytes[row].fill(0xFF));
        }
        match bytes.iter().position(|b| *b != 0xFF) {
            Some(i) => Err(Failure::wrong(format!("{what}: byte {i} outside the written elements was changed"))),
            None => Ok(()),
        }
    }

    /// Checks that `tensor` still is poison, all of it.
    ///
    /// # Errors
    /// [`Failure::Wrong`] naming the first byte.
    pub fn check_untouched(&self, what: &str, tensor: &Tensor<B>) -> Result<(), Failure> {
        self.check_outside(what, &tensor.buffer, &[])
    }
}

/// An array of `extent` from its values.
///
/// # Errors
/// [`Error::Invalid`] if their number does not fit.
pub fn array<T>(extent: Extent, values: Vec<T>) -> Result<Array4<T>, Error> {
    let [b, s, h, d] = extent;
    Array4::from_shape_vec((b, s, h, d), values).map_err(|e| Error::invalid("tensor", e.to_string()))
}

/// Calls `f` with the byte range of every row (along the last axis) of `at`.
pub fn for_each_row(at: &Strided, mut f: impl FnMut(std::ops::Range<usize>)) {
    let ([b, s, h, d], size) = (at.extent(), at.dtype().size());
    if d == 0 {
        return;
    }
    for (b, s, h) in (0..b).flat_map(|b| (0..s).flat_map(move |s| (0..h).map(move |h| (b, s, h)))) {
        let start = at.offset_of([b, s, h, 0]) * size;
        f(start..start + d * size);
    }
}
