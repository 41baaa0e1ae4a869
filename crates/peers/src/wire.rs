//! Frames of the control connection: length, kind, and fields written one after the other.

use std::collections::BTreeSet;
use std::io::{Error, Read, Result, Write};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use longspan_hal::Step;

use crate::lock;

/// The most bytes of a frame: gathered results of a rank. Memory grows with what arrives, not with what is announced.
const LIMIT: u64 = 64 << 30;

/// Fields of a frame, or of what ranks offer each other.
#[derive(Clone, Debug, Default)]
pub struct Fields(
    /// What was written so far.
    pub Vec<u8>,
);

impl Fields {
    /// Adds a number.
    pub fn number(mut self, x: u64) -> Self {
        self.0.extend(x.to_le_bytes());
        self
    }

    /// Adds bytes with their length.
    pub fn bytes(self, x: &[u8]) -> Self {
        let mut this = self.number(x.len() as u64);
        this.0.extend(x);
        this
    }

    /// Adds a limit, or that there is none.
    pub(crate) fn limit(self, limit: Option<Duration>) -> Self {
        let nanos = |limit: Duration| u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX).max(1);
        self.number(limit.map_or(0, nanos))
    }

    /// Adds a step.
    pub fn step(self, step: Step) -> Self {
        self.bytes(step.phase.as_bytes()).number(u64::from(step.index))
    }
}

/// Reads fields in the order in which they were added.
#[derive(Debug)]
pub struct Reader<'a>(
    /// What was not read yet.
    pub &'a [u8],
);

impl<'a> Reader<'a> {
    /// The next number.
    ///
    /// # Errors
    /// If there are too few bytes.
    pub fn number(&mut self) -> Result<u64> {
        let (head, rest) = self.0.split_first_chunk().ok_or_else(|| Error::other("a frame that is too short"))?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*head))
    }

    /// The next bytes.
    ///
    /// # Errors
    /// If there are too few bytes.
    pub fn bytes(&mut self) -> Result<&'a [u8]> {
        let n = self.number()? as usize;
        let (head, rest) = self.0.split_at_checked(n).ok_or_else(|| Error::other("a frame that is too short"))?;
        self.0 = rest;
        Ok(head)
    }

    /// The next text.
    ///
    /// # Errors
    /// If there are too few bytes.
    pub fn text(&mut self) -> Result<String> {
        Ok(String::from_utf8_lossy(self.bytes()?).into_owned())
    }

    /// The next limit.
    ///
    /// # Errors
    /// If there are too few bytes.
    pub(crate) fn limit(&mut self) -> Result<Option<Duration>> {
        let nanos = self.number()?;
        Ok((nanos > 0).then(|| Duration::from_nanos(nanos)))
    }

    /// The next step.
    ///
    /// # Errors
    /// If there are too few bytes.
    pub fn step(&mut self) -> Result<Step> {
        let phase = intern(&self.text()?);
        Ok(Step { phase, index: self.number()? as u32 })
    }
}

/// A step's (or an error's) name that lives as long as the process. The names of an algorithm's phases are few; a peer that invents more than
/// fits gets a general one.
pub(crate) fn intern(text: &str) -> &'static str {
    static NAMES: LazyLock<Mutex<BTreeSet<&'static str>>> = LazyLock::new(Mutex::default);
    let mut names = lock(&NAMES);
    if let Some(name) = names.get(text) {
        return name;
    }
    if names.len() >= 1000 || text.len() > 200 {
        return "step";
    }
    let name: &'static str = Box::leak(text.to_owned().into_boxed_str());
    names.insert(name);
    name
}

/// Writes a frame.
pub(crate) fn write(to: &mut impl Write, kind: u8, fields: &Fields) -> Result<()> {
    let mut all = Vec::with_capacity(9 + fields.0.len());
    all.extend((fields.0.len() as u64).to_le_bytes());
    all.push(kind);
    all.extend(&fields.0);
    to.write_all(&all)
}

/// Reads a frame.
pub(crate) fn read(from: &mut impl Read) -> Result<(u8, Vec<u8>)> {
    let mut head = [0u8; 9];
    from.read_exact(&mut head)?;
    let length = u64::from_le_bytes(std::array::from_fn(|i| head[i]));
    if length > LIMIT {
        return Err(Error::other("a frame that is too long"));
    }
    let mut body = Vec::new();
    if from.take(length).read_to_end(&mut body)? as u64 != length {
        return Err(Error::from(std::io::ErrorKind::UnexpectedEof));
    }
    Ok((head[8], body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back_in_order() {
        let step = Step { phase: "ring forward", index: 3 };
        let mut buffer = Vec::new();
        write(&mut buffer, 7, &Fields::default().number(5).bytes(b"abc").step(step)).expect("memory");
        let (kind, body) = read(&mut buffer.as_slice()).expect("a frame");
        let mut fields = Reader(&body);
        assert_eq!((kind, fields.number().ok(), fields.text().ok()), (7, Some(5), Some("abc".into())));
        assert_eq!(fields.step().ok(), Some(step));
        assert!(fields.number().is_err());
    }

    #[test]
    fn a_frame_that_is_too_long_or_cut_is_refused() {
        assert!(read(&mut [0xFFu8; 9].as_slice()).is_err());
        assert!(read(&mut [9, 0, 0, 0, 0, 0, 0, 0, 1, 2].as_slice()).is_err());
    }
}
