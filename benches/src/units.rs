//! Sizes and times as people write and read them.

/// Reads `8`, `64KiB`, `1MiB`, `1.5MiB`, `10kB`, `2 GB`: a count of bytes.
pub fn parse_size(text: &str) -> Result<usize, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024.0 * 1024.0,
        "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        _ => {
            return Err(format!("{text:?} is not a size; write 8, 64KiB, 1MiB or 10MB"));
        }
    };
    let value: f64 =
        number.parse().map_err(|_| format!("{text:?} is not a size; write 8, 64KiB or 1MiB"))?;
    let bytes = value * factor;
    if bytes.fract() != 0.0 || bytes > (1u64 << 40) as f64 {
        return Err(format!("{text:?} is not a whole number of bytes up to 1 TiB"));
    }
    Ok(bytes as usize)
}

/// `8 B`, `64 KiB`, `8 MiB`, `620265 B`: exact, in the largest binary unit that divides it.
pub fn show_size(bytes: usize) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} B")
}

/// A figure with three significant digits and without an exponent.
pub fn show_figure(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude >= 99.95 {
        format!("{value:.0}")
    } else if magnitude >= 9.995 {
        format!("{value:.1}")
    } else if magnitude >= 0.9995 {
        format!("{value:.2}")
    } else {
        format!("{value:.3}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_every_spelling() {
        for (text, bytes) in [
            ("8", 8),
            ("0", 0),
            ("8B", 8),
            ("64KiB", 65536),
            ("64k", 65536),
            ("1 MiB", 1 << 20),
            ("1.5MiB", 3 << 19),
            ("10kB", 10_000),
            ("2GiB", 2 << 30),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "KiB", "8 apples", "-1", "0.3", "9999999GiB", "1.2.3"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_exactly() {
        assert_eq!(show_size(8), "8 B");
        assert_eq!(show_size(65536), "64 KiB");
        assert_eq!(show_size(8 << 20), "8 MiB");
        assert_eq!(show_size(620_265), "620265 B");
        assert_eq!(show_size(0), "0 B");
    }

    #[test]
    fn figures_keep_three_digits() {
        assert_eq!(show_figure(0.1689), "0.169");
        assert_eq!(show_figure(1.004), "1.00");
        assert_eq!(show_figure(12.34), "12.3");
        assert_eq!(show_figure(812.6), "813");
    }
}
