//! What there is of a vendor on this machine, for people.

use std::ffi::c_int;

use longspan_dylib::table;
use longspan_hal::{Error, Finding, Result};

use crate::cache::Cache;
use crate::device::version_text;
use crate::driver::Driver;
use crate::machine::{Machine, Vendor};

table! {
    /// What only people ask.
    struct Links {
        /// A figure of a pair of devices.
        fn pair["cuDeviceGetP2PAttribute", "hipDeviceGetP2PAttribute"](
            value: *mut c_int, attribute: c_int, from: c_int, to: c_int,
        ) -> c_int;
    }
}

/// Libraries with their versions, devices, which device reaches which and how, and the cache of kernels.
pub(crate) fn findings<V: Vendor>() -> Vec<Finding> {
    let (machine, facts) = (V::machine(), V::machine().facts());
    let mut list = vec![
        Finding::new(format!("driver ({})", facts.driver.what), driver(machine, V::driver_release())),
        Finding::new(
            format!("compiler ({})", facts.compiler.what),
            machine.compiler().map(|c| format!("{}, {}", c.version(), c.path().to_string_lossy())),
        ),
        Finding::new(
            format!("collectives ({})", facts.nccl.what),
            machine.nccl().map(|nccl| match nccl.version() {
                Some(version) => format!("{version}, {}", nccl.path().to_string_lossy()),
                None => nccl.path().to_string_lossy().into_owned(),
            }),
        ),
    ];
    if let Some(products) = V::products() {
        let loaded = machine.products(&products);
        let state = loaded.map(|f| format!("{} (for the peak of `bench`)", f.library().path().to_string_lossy()));
        list.push(Finding::new(format!("matrix products ({})", products.place.what), state));
    }
    list.extend(devices(machine));
    list.push(Finding::new("kernel cache", Ok(cache(&Cache::open(V::NAME)))));
    list
}

fn driver(machine: &'static Machine, release: Option<String>) -> Result<String> {
    let driver = machine.driver()?;
    let mut version = 0;
    // SAFETY: `version` is written.
    machine.check(driver, unsafe { driver.version(&mut version) })?;
    let release = release.map_or(String::new(), |r| format!("{r}, "));
    Ok(format!("{release}interface {}, {}", version_text(version), driver.library().path().to_string_lossy()))
}

/// A line for each device, and one for their links. Nothing where there is no driver: that has been said.
fn devices(machine: &'static Machine) -> Vec<Finding> {
    let Ok(driver) = machine.driver() else { return Vec::new() };
    let devices = match machine.devices() {
        Ok(devices) if devices.is_empty() => {
            let none = Error::Unavailable {
                library: "a device".to_owned(),
                why: "the driver lists none".to_owned(),
                how_to_get_it: "look at the vendor's own tool, and at the variables that hide devices".to_owned(),
            };
            return vec![Finding::new("devices", Err(none))];
        }
        Ok(devices) => devices,
        Err(error) => return vec![Finding::new("devices", Err(error))],
    };
    let one = |d: &longspan_hal::DeviceInfo| {
        let state = machine.arch(driver, d.index).map(|(arch, units)| {
            format!(
                "{}, {arch}, {units} multiprocessors, {:.1} GiB",
                d.name,
                d.memory_bytes as f64 / f64::from(1 << 30)
            )
        });
        Finding::new(format!("GPU {}", d.index), state)
    };
    let mut list: Vec<Finding> = devices.iter().map(one).collect();
    let ordinals: Vec<u32> = devices.iter().map(|d| d.index).collect();
    if ordinals.len() > 1 {
        let apart = without(&ordinals, |a, b| machine.reaches(driver, a, b));
        list.push(Finding::new("peer access", apart.map(|apart| said(ordinals.len(), &apart))));
        list.extend(links(machine, driver, &ordinals).map(|state| Finding::new("links", state)));
    }
    list
}

/// Which pairs of devices have the vendor's fast link, where that can be asked.
fn links(machine: &Machine, driver: &Driver, ordinals: &[u32]) -> Option<Result<String>> {
    let (attribute, link) = machine.facts().fast_link?;
    let functions = Links::load(driver.library().clone(), machine.facts().flavor.column()).ok()?;
    let linked = |a, b| {
        let (from, to, mut value) = (machine.device(driver, a)?, machine.device(driver, b)?, 0);
        // SAFETY: `value` is written.
        machine.check(driver, unsafe { functions.pair(&mut value, attribute, from, to) })?;
        Ok(value != 0)
    };
    Some(without(ordinals, linked).map(|apart| match &apart[..] {
        [] => format!("{link} between all {} devices", ordinals.len()),
        apart => format!("no {link} from {}", apart.join(", ")),
    }))
}

/// Pairs of devices that do not have what is asked, each way.
fn without(ordinals: &[u32], has: impl Fn(u32, u32) -> Result<bool>) -> Result<Vec<String>> {
    let mut list = Vec::new();
    for &a in ordinals {
        for &b in ordinals.iter().filter(|b| **b != a) {
            if !has(a, b)? {
                list.push(format!("{a} to {b}"));
            }
        }
    }
    Ok(list)
}

fn said(devices: usize, apart: &[String]) -> String {
    if apart.is_empty() {
        return format!("all {devices} devices access each other's memory: messages travel by peer copies");
    }
    format!("not from {}: groups with such a pair need the library of collectives", apart.join(", "))
}

fn cache(cache: &Cache) -> String {
    let figures = cache.figures();
    match cache.folder() {
        Some(folder) => format!("{} files, {} bytes in {}", figures.files, figures.bytes, folder.display()),
        None => "none: set HOME or LONGSPAN_CACHE, or every process compiles kernels again".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_name_the_pairs_that_are_apart() {
        assert!(said(8, &[]).contains("all 8 devices"));
        let apart = without(&[0, 1, 2], |a, b| Ok(a + b != 2)).expect("answered");
        let text = said(3, &apart);
        assert!(text.contains("0 to 2, 2 to 0") && text.contains("library"), "{text}");
    }

    #[test]
    fn a_cache_says_where_it_is() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let text = cache(&Cache::at(folder.path()));
        assert!(text.starts_with("0 files, 0 bytes in ") && text.contains(&*folder.path().to_string_lossy()), "{text}");
    }
}
