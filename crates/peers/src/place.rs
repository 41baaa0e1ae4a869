//! Where a board is: the addresses of its host, and a secret word that keeps strangers out.

use std::io::{Error, Result};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::wire::{Fields, Reader};

/// The variable that names the address at which other hosts reach this one.
const ADDRESS: &str = "LONGSPAN_ADDRESS";

/// How long one of several addresses is tried before the next.
const TRY: Duration = Duration::from_secs(2);
/// How long until all addresses are tried again.
const PAUSE: Duration = Duration::from_millis(100);

/// Who has to reach a board.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reach {
    /// Ranks of this host: it listens on the loopback interface alone.
    Host,
    /// Ranks of other hosts too. `LONGSPAN_ADDRESS` names the address to use, otherwise all of this host are tried.
    Network,
}

/// Whether this process is one of a job over several hosts.
static NETWORK: AtomicBool = AtomicBool::new(false);

impl Reach {
    /// Who has to reach the boards of this process's groups.
    pub fn of_job() -> Self {
        if NETWORK.load(Ordering::Relaxed) { Self::Network } else { Self::Host }
    }

    /// Says who has to reach the boards of groups that this process makes later.
    pub fn set_for_job(self) {
        NETWORK.store(self == Self::Network, Ordering::Relaxed);
    }
}

/// Where a board is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Place {
    word: Vec<u8>,
    addresses: Vec<SocketAddr>,
}

impl Place {
    /// A place that every rank knows beforehand, such as a launcher's master address.
    pub fn known(addresses: Vec<SocketAddr>, word: &[u8]) -> Self {
        Self { word: word.to_vec(), addresses }
    }

    /// A listening socket and its place.
    pub(crate) fn open(reach: Reach) -> Result<(TcpListener, Self)> {
        let named = std::env::var(ADDRESS).ok().filter(|a| !a.is_empty());
        let named = named.map(|a| a.parse::<IpAddr>().map_err(|e| Error::other(format!("{ADDRESS}={a}: {e}"))));
        let (bind, hosts) = match (named.transpose()?, reach) {
            (Some(address), _) => (address, vec![address]),
            (None, Reach::Host) => (Ipv4Addr::LOCALHOST.into(), vec![Ipv4Addr::LOCALHOST.into()]),
            (None, Reach::Network) => (Ipv4Addr::UNSPECIFIED.into(), own_addresses()?),
        };
        let listener = TcpListener::bind((bind, 0))?;
        let port = listener.local_addr()?.port();
        let mut word = vec![0; 16];
        getrandom::fill(&mut word).map_err(|e| Error::other(e.to_string()))?;
        Ok((listener, Self { word, addresses: hosts.into_iter().map(|host| SocketAddr::new(host, port)).collect() }))
    }

    /// The word that opens the board.
    pub(crate) fn word(&self) -> &[u8] {
        &self.word
    }

    /// Connects to the first address that answers, within `limit`; a board that does not listen yet is tried again.
    pub(crate) fn connect(&self, limit: Duration) -> Result<TcpStream> {
        // A limit further away than the clock can say is none.
        let until = Instant::now().checked_add(limit);
        let left = || until.map_or(limit, |until| until.saturating_duration_since(Instant::now()));
        loop {
            let mut last = Error::other("no address is known");
            for address in &self.addresses {
                match TcpStream::connect_timeout(address, left().clamp(Duration::from_millis(1), TRY)) {
                    Ok(socket) => return Ok(socket),
                    Err(error) => last = Error::new(error.kind(), format!("{address}: {error}")),
                }
            }
            if left() <= PAUSE {
                return Err(last);
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// The place as bytes, to hand to the other ranks.
    pub fn to_bytes(&self) -> Vec<u8> {
        let fields = Fields::default().bytes(&self.word);
        self.addresses.iter().fold(fields, |f, a| f.bytes(a.to_string().as_bytes())).0
    }

    /// The place that [`Place::to_bytes`] wrote.
    ///
    /// # Errors
    /// If the bytes are of something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut fields = Reader(bytes);
        let (word, mut addresses) = (fields.bytes()?.to_vec(), Vec::new());
        while !fields.0.is_empty() {
            addresses.push(fields.text()?.parse().map_err(|_| Error::other("a board's address can't be read"))?);
        }
        Ok(Self { word, addresses })
    }
}

/// Addresses of this host, those first that another host may reach; loopback last, for ranks beside this one.
fn own_addresses() -> Result<Vec<IpAddr>> {
    let mut all: Vec<IpAddr> = if_addrs::get_if_addrs()?.iter().map(if_addrs::Interface::ip).collect();
    // The socket listens on IPv4; a cluster without it names its address in the variable.
    all.retain(IpAddr::is_ipv4);
    all.sort_by_key(IpAddr::is_loopback);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_comes_back_from_its_bytes() {
        let place = Place::known(vec!["10.0.0.7:99".parse().expect("one"), "[::1]:5".parse().expect("one")], b"word");
        assert_eq!(Place::from_bytes(&place.to_bytes()).expect("written above"), place);
        assert!(Place::from_bytes(&[1, 2, 3]).is_err());
        assert!(Place::from_bytes(&Fields::default().bytes(b"w").bytes(b"nowhere").0).is_err());
    }

    #[test]
    fn two_places_have_two_words_and_the_loopback_comes_last() {
        let [a, b] = [Reach::Host, Reach::Network].map(|reach| Place::open(reach).expect("a socket").1);
        assert_ne!(a.word, b.word);
        assert!(a.addresses.iter().all(|a| a.ip().is_loopback()));
        let loopback: Vec<bool> = b.addresses.iter().map(|a| a.ip().is_loopback()).collect();
        assert!(loopback.is_sorted(), "{:?}", b.addresses);
    }

    #[test]
    fn nobody_there_is_an_error_within_the_limit() {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr()).expect("a port");
        assert!(Place::known(vec![port], b"").connect(Duration::from_millis(150)).is_err());
    }
}
