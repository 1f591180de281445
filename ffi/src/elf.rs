//! Whether a shared object is all there. The dynamic linker maps segments without comparing them
//! with the length of the file, and a file that was cut short then ends the process by SIGBUS.

use std::fs::File;
use std::io::Read;
use std::path::Path;

const HEADER_BYTES: usize = 64;
const SEGMENT_BYTES: usize = 56;
/// Far more than any shared object has.
const SEGMENTS_MAX: usize = 1024;
const PT_LOAD: u32 = 1;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes)
}

/// `Err` says what is wrong with the file.
pub(crate) fn check(path: &Path) -> Result<(), String> {
    let mut file = File::open(path).map_err(|error| error.to_string())?;
    let len = file.metadata().map_err(|error| error.to_string())?.len();
    let mut start = Vec::new();
    file.by_ref().take(1 << 20).read_to_end(&mut start).map_err(|error| error.to_string())?;
    check_bytes(&start, len)
}

fn check_bytes(start: &[u8], len: u64) -> Result<(), String> {
    let cut = || format!("the file is truncated: {len} bytes");
    if start.len() < HEADER_BYTES {
        return Err(cut());
    }
    if start[..4] != *b"\x7fELF" || start[4] != 2 {
        return Err("not a 64-bit shared object".into());
    }
    let (Some(table), Some(size), Some(count)) =
        (u64_at(start, 32), u16_at(start, 54), u16_at(start, 56))
    else {
        return Err(cut());
    };
    let count = usize::from(count);
    if usize::from(size) != SEGMENT_BYTES || count > SEGMENTS_MAX {
        return Err("not a shared object of this platform".into());
    }
    let table = usize::try_from(table).map_err(|_| cut())?;
    for index in 0..count {
        let at = table.checked_add(index * SEGMENT_BYTES).ok_or_else(cut)?;
        let segment = start.get(at..).filter(|rest| rest.len() >= SEGMENT_BYTES).ok_or_else(cut)?;
        let (Some(kind), Some(offset), Some(size)) =
            (u32_at(segment, 0), u64_at(segment, 8), u64_at(segment, 32))
        else {
            return Err(cut());
        };
        if kind == PT_LOAD && offset.checked_add(size).is_none_or(|end| end > len) {
            return Err(cut());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn this_program() -> Vec<u8> {
        std::fs::read("/proc/self/exe").expect("readable")
    }

    #[test]
    fn a_whole_object_passes() {
        assert_eq!(check(Path::new("/proc/self/exe")), Ok(()));
    }

    #[test]
    fn every_shorter_length_is_told() {
        let whole = this_program();
        for len in [0, 1, 63, 64, 100, 1000, 8192, 65536] {
            let error = check_bytes(&whole[..len], len as u64);
            assert!(error.is_err(), "{len} bytes pass");
        }
    }

    #[test]
    fn other_files_are_no_objects() {
        assert!(check_bytes(&[b'#'; 200], 200).is_err());
        let mut odd = this_program();
        odd.truncate(4096);
        // A table that begins past the end of everything.
        odd[32..40].copy_from_slice(&u64::MAX.to_ne_bytes());
        assert!(check_bytes(&odd, 1 << 40).is_err());
    }
}
