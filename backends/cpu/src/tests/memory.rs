//! Allocation, adoption, copies through streams.

use std::sync::Arc;

use longspan_hal::{DType, Device, Error, Strided};

use super::*;

#[test]
fn memory_is_aligned_counted_and_poisoned() {
    let device = device(CHECKED);
    let on = stream(&device);
    let a = device.alloc(1000).expect("little");
    let b = device.alloc(24).expect("little");
    assert!((a.ptr() as usize).is_multiple_of(256) && (b.ptr() as usize).is_multiple_of(256));
    assert_eq!(CpuDevice::bytes(&a), 1000);
    assert!(download(&device, &on, &a, dense([1, 1, 1, 250])).expect("fresh").iter().all(|v| v.is_nan()));
    drop(a);
    let memory = device.memory().expect("always known");
    assert_eq!((memory.used, memory.peak), (24, 1024));
    assert!(memory.free > 0);
    let (x, y) = (device.alloc(0).expect("nothing"), device.alloc(0).expect("nothing"));
    assert!(!CpuDevice::same(&x, &y) && CpuDevice::same(&x, &x.clone()) && !CpuDevice::same(&b, &x));
}

#[test]
fn too_much_is_out_of_memory_and_not_the_end() {
    let device = device(PLAIN);
    for bytes in [usize::MAX, usize::MAX - 300, isize::MAX as usize, 1 << 50] {
        let refused = device.alloc(bytes);
        assert!(matches!(refused, Err(Error::OutOfMemory { wanted, .. }) if wanted == bytes as u64), "{refused:?}");
    }
    assert_eq!(device.memory().expect("known").peak, 0);
}

#[repr(align(16))]
struct Aligned([f32; 8]);

#[test]
fn adopted_memory_keeps_its_owner_and_shares_its_table() {
    let device = device(CHECKED);
    let owner = Arc::new(Aligned([1.0; 8]));
    let at = owner.0.as_ptr().cast_mut().cast();
    // SAFETY: the owner holds the memory; only device work below touches it.
    let whole = unsafe { device.adopt(at, 32, Some(owner.clone())) }.expect("aligned");
    // SAFETY: as above; the upper half, 16 bytes further.
    let upper = unsafe { device.adopt(at.byte_add(16), 16, Some(owner.clone())) }.expect("aligned");
    // SAFETY: never dereferenced, as it is refused.
    assert!(unsafe { device.adopt(at.byte_add(4), 16, None) }.is_err());
    // SAFETY: as above.
    assert!(unsafe { device.adopt(std::ptr::null_mut(), 16, None) }.is_err());
    assert_eq!(Arc::strong_count(&owner), 3);
    let (a, b) = (stream(&device), stream(&device));
    device.fill(&a, 2.0, write(&whole, dense([1, 1, 1, 8]))).expect("queued");
    watch(&device, &a);
    let race = download(&device, &b, &upper, dense([1, 1, 1, 4]));
    assert!(matches!(race, Err(Error::Race { .. })), "{race:?}");
    assert_eq!(download(&device, &a, &upper, dense([1, 1, 1, 4])), Ok(vec![2.0; 4]));
    drop((whole, upper, a, b));
    assert_eq!(Arc::strong_count(&owner), 1);
    // SAFETY: refused.
    let foreign = unsafe { device.adopt_stream(std::ptr::null_mut()) };
    assert!(matches!(foreign, Err(Error::Unsupported { .. })));
}

#[test]
fn queued_work_keeps_its_buffers() {
    let device = device(PLAIN);
    let on = stream(&device);
    for _ in 0..50 {
        let a = device.alloc(4096).expect("little");
        device.fill(&on, 1.0, write(&a, dense([1, 1, 1, 1024]))).expect("queued");
    }
    device.synchronize(&on, LONG).expect("all memory was alive");
    assert_eq!(device.memory().expect("known").used, 0);
}

#[test]
fn copies_between_layouts_and_refuses_what_does_not_fit() {
    let device = device(CHECKED);
    let on = stream(&device);
    let (bshd, bhsd) = (dense([2, 3, 4, 5]), Strided::dense_bhsd(DType::F32, [2, 3, 4, 5]));
    let (a, b) = (device.alloc(480).expect("little"), device.alloc(480).expect("little"));
    let values: Vec<f32> = (0..120u8).map(f32::from).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    device.upload(&on, &bytes, write(&a, bhsd)).expect("queued");
    device.copy(&on, read(&a, bhsd), write(&b, bshd)).expect("queued");
    assert_eq!(download(&device, &on, &b, bshd), Ok(values.clone()));
    assert_eq!(download(&device, &on, &a, bhsd), Ok(values));
    let mut odd = vec![0u8; 481];
    device.download(&on, read(&a, bhsd), &mut odd[1..], LONG).expect("unaligned host bytes are fine");
    assert_eq!(odd[1..], bytes);

    let small = dense([2, 3, 4, 4]);
    assert!(device.copy(&on, read(&a, bshd), write(&b, small)).is_err());
    assert!(device.copy(&on, read(&a, bshd), write(&a, bhsd)).is_err());
    assert!(device.upload(&on, &bytes[4..], write(&a, bshd)).is_err());
    assert!(device.download(&on, read(&a, bshd), &mut odd, LONG).is_err());
    device.synchronize(&on, LONG).expect("refusals leave the stream alone");
}
