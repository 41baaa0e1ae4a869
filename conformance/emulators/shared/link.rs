//! Compiled into every emulator. The wires between the ranks of a communicator: local sockets, within a process and between processes alike.
//!
//! A frame is kind (u8), type (u32), count (u64), bytes (u64) and the bytes. Every rank reads all its sockets all the time, so
//! a sender never blocks in the socket; it blocks until the receiver *acknowledges*, which it does when its receive runs.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::state::{CONFIG, lock};

const ACK: u8 = 1;
/// A message.
pub const DATA: u8 = 2;
/// A message of an all-to-all.
pub const ALL_TO_ALL: u8 = 4;
/// A rank is at a barrier.
pub const BARRIER: u8 = 3;
/// A rank uses a pair for the first time.
pub const CONNECT: u8 = 5;

/// A message that arrived.
pub struct Frame {
    pub kind: u8,
    pub dtype: i32,
    pub count: u64,
    pub bytes: Vec<u8>,
}

/// The socket to one peer, and what came through it.
pub struct Peer {
    writer: Mutex<UnixStream>,
    inbox: Mutex<Inbox>,
    wake: Condvar,
}

#[derive(Default)]
struct Inbox {
    frames: VecDeque<Frame>,
    acks: u64,
}

fn address(name: &str, rank: u32) -> std::io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("{name}-{rank}"))
}

/// Connects `rank` of `size` with all others; `None` at its own place. `device` must differ between ranks.
pub fn connect(name: &str, rank: u32, size: u32, device: u32) -> std::io::Result<Vec<Option<Arc<Peer>>>> {
    let until = Instant::now() + CONFIG.timeout;
    let listener = UnixListener::bind_addr(&address(name, rank)?)?;
    listener.set_nonblocking(true)?;
    let hello = [rank.to_le_bytes(), size.to_le_bytes(), device.to_le_bytes()].concat();
    let mut sockets: Vec<Option<UnixStream>> = (0..size).map(|_| None).collect();
    for lower in 0..rank {
        let mut socket = retry(until, || UnixStream::connect_addr(&address(name, lower)?))?;
        socket.write_all(&hello)?;
        check(&mut socket, size, device)?;
        sockets[lower as usize] = Some(socket);
    }
    for _ in rank + 1..size {
        let (mut socket, _) = retry(until, || listener.accept())?;
        socket.set_nonblocking(false)?;
        let peer = check(&mut socket, size, device)?;
        socket.write_all(&hello)?;
        sockets[peer as usize] = Some(socket);
    }
    sockets.into_iter().map(|socket| socket.map(Peer::start).transpose()).collect()
}

fn retry<T>(until: Instant, mut f: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    loop {
        match f() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= until => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Reads a peer's hello.
fn check(socket: &mut UnixStream, size: u32, device: u32) -> std::io::Result<u32> {
    let mut hello = [0u8; 12];
    socket.set_read_timeout(Some(CONFIG.timeout))?;
    socket.read_exact(&mut hello)?;
    socket.set_read_timeout(None)?;
    let word = |i: usize| u32::from_le_bytes([hello[i], hello[i + 1], hello[i + 2], hello[i + 3]]);
    if word(4) != size || word(8) == device {
        return Err(std::io::Error::other("another number of ranks, or two ranks on one device"));
    }
    Ok(word(0))
}

impl Peer {
    fn start(socket: UnixStream) -> std::io::Result<Arc<Self>> {
        let mut reader = socket.try_clone()?;
        let peer = Arc::new(Self { writer: Mutex::new(socket), inbox: Mutex::default(), wake: Condvar::new() });
        let weak = Arc::downgrade(&peer);
        std::thread::Builder::new().name("device link".into()).spawn(move || {
            while let Ok(frame) = read(&mut reader) {
                let Some(peer) = weak.upgrade() else { return };
                let mut inbox = lock(&peer.inbox);
                if frame.kind == ACK {
                    inbox.acks += 1;
                } else {
                    inbox.frames.push_back(frame);
                }
                peer.wake.notify_all();
            }
        })?;
        Ok(peer)
    }

    /// Sends a frame. A peer that is gone is not noticed, as on the real thing.
    pub fn send(&self, kind: u8, dtype: i32, count: u64, bytes: &[u8]) {
        let mut all = vec![kind];
        all.extend(dtype.to_le_bytes());
        all.extend(count.to_le_bytes());
        all.extend((bytes.len() as u64).to_le_bytes());
        all.extend(bytes);
        let _ = lock(&self.writer).write_all(&all);
    }

    /// Says that a receive ran.
    pub fn acknowledge(&self) {
        self.send(ACK, 0, 0, &[]);
    }

    /// The next message, or `None` when `over` says so.
    pub fn receive(&self, over: impl Fn() -> bool) -> Option<Frame> {
        self.until(over, |inbox| inbox.frames.pop_front())
    }

    /// Waits until the peer has received one message more.
    pub fn acknowledged(&self, over: impl Fn() -> bool) -> Option<()> {
        self.until(over, |inbox| (inbox.acks > 0).then(|| inbox.acks -= 1))
    }

    fn until<T>(&self, over: impl Fn() -> bool, mut take: impl FnMut(&mut Inbox) -> Option<T>) -> Option<T> {
        let mut inbox = lock(&self.inbox);
        loop {
            if let Some(value) = take(&mut inbox) {
                return Some(value);
            }
            if over() {
                return None;
            }
            let nap = Duration::from_millis(2);
            inbox = self.wake.wait_timeout(inbox, nap).map_or_else(|e| e.into_inner().0, |(i, _)| i);
        }
    }

    /// Ends the socket.
    pub fn close(&self) {
        let _ = lock(&self.writer).shutdown(std::net::Shutdown::Both);
    }
}

fn read(from: &mut UnixStream) -> std::io::Result<Frame> {
    let mut head = [0u8; 21];
    from.read_exact(&mut head)?;
    let long = |i: usize| u64::from_le_bytes(std::array::from_fn(|n| head[i + n]));
    let dtype = i32::from_le_bytes(std::array::from_fn(|n| head[1 + n]));
    let mut bytes = vec![0; long(13) as usize];
    from.read_exact(&mut bytes)?;
    Ok(Frame { kind: head[0], dtype, count: long(5), bytes })
}
