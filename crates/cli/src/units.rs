//! Quantities as people write them: `60s`, `8 MiB`, `80%`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::{Serialize, Serializer};

/// A text is no quantity of the kind that was asked for.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{given:?} is no {expected}")]
pub struct BadQuantity {
    given: String,
    expected: &'static str,
}

impl BadQuantity {
    fn new(given: &str, expected: &'static str) -> Self {
        Self { given: given.chars().take(60).collect(), expected }
    }
}

/// A span of time such as `250ms`, `1.5m` or `0`; the units are us, ms, s, m, h and d.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Period(pub Duration);

impl Period {
    const EXPECTED: &str = "duration; examples: \"250ms\", \"60s\", \"1.5m\", \"2h\"";
    /// The longest span that is accepted: anything longer is a typing error.
    const LONGEST: f64 = 1e9;
    const UNITS: [(&str, f64); 6] =
        [("us", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86_400.0)];

    /// So many whole seconds.
    pub const fn secs(n: u64) -> Self {
        Self(Duration::from_secs(n))
    }

    /// The span in milliseconds, at least 1 unless it is zero.
    pub fn millis(self) -> u64 {
        let ms = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        if ms == 0 && !self.0.is_zero() { 1 } else { ms }
    }
}

impl FromStr for Period {
    type Err = BadQuantity;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let bad = || BadQuantity::new(s, Self::EXPECTED);
        let (number, unit) = split_number(s).ok_or_else(bad)?;
        let seconds = match unit {
            "" if number == 0.0 => 0.0,
            unit => {
                let (_, scale) = Self::UNITS.iter().find(|(u, _)| *u == unit).ok_or_else(bad)?;
                number * scale
            }
        };
        if seconds > Self::LONGEST {
            return Err(bad());
        }
        // Through whole nanoseconds, so that 0.3s is not 299.999999ms.
        Ok(Self(Duration::from_nanos((seconds * 1e9).round() as u64)))
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = self.0.as_micros();
        let exact = [(3_600_000_000, "h"), (60_000_000, "m"), (1_000_000, "s"), (1000, "ms")];
        if us == 0 {
            return f.write_str("0s");
        }
        for (scale, unit) in exact {
            // "60s" reads better than "1m", "90s" better than "1.5m".
            if us.is_multiple_of(scale) && (scale < 60_000_000 || us / scale > 1) {
                return write!(f, "{}{unit}", us / scale);
            }
        }
        write!(f, "{us}us")
    }
}

/// A number of bytes such as `8 MiB`, `1.5 GiB`, `100 MB` or `4096`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Size(pub u64);

impl Size {
    const EXPECTED: &str = "size in bytes; examples: \"8 MiB\", \"1.5 GiB\", \"100 MB\", 4096";
    const UNITS: [(&str, f64); 14] = [
        ("", 1.0),
        ("b", 1.0),
        ("k", 1024.0),
        ("m", 1_048_576.0),
        ("g", 1_073_741_824.0),
        ("t", 1_099_511_627_776.0),
        ("kib", 1024.0),
        ("mib", 1_048_576.0),
        ("gib", 1_073_741_824.0),
        ("tib", 1_099_511_627_776.0),
        ("kb", 1e3),
        ("mb", 1e6),
        ("gb", 1e9),
        ("tb", 1e12),
    ];

    /// So many MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
}

impl FromStr for Size {
    type Err = BadQuantity;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let bad = || BadQuantity::new(s, Self::EXPECTED);
        let (number, unit) = split_number(s).ok_or_else(bad)?;
        let unit = unit.to_ascii_lowercase();
        let (_, scale) = Self::UNITS.iter().find(|(u, _)| *u == unit).ok_or_else(bad)?;
        let bytes = number * scale;
        if bytes > i64::MAX as f64 {
            return Err(bad());
        }
        Ok(Self(bytes.round() as u64))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// A number of bytes, or a share of the machine's memory such as `80%`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemoryAmount {
    /// So many bytes.
    Bytes(Size),
    /// So many hundredths of the machine's memory, 1 to 100.
    Percent(u8),
}

impl MemoryAmount {
    const EXPECTED: &str = "amount of memory; examples: \"80%\", \"16 GiB\"";

    /// The amount in bytes on a machine with `total` bytes of memory.
    pub fn of(self, total: u64) -> u64 {
        match self {
            Self::Bytes(size) => size.0,
            Self::Percent(p) => total / 100 * u64::from(p),
        }
    }
}

impl FromStr for MemoryAmount {
    type Err = BadQuantity;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let bad = || BadQuantity::new(s, Self::EXPECTED);
        match s.trim().strip_suffix('%') {
            Some(percent) => match percent.trim().parse() {
                Ok(p @ 1..=100) => Ok(Self::Percent(p)),
                _ => Err(bad()),
            },
            None => s.parse().map(Self::Bytes).map_err(|_| bad()),
        }
    }
}

impl fmt::Display for MemoryAmount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(size) => size.fmt(f),
            Self::Percent(p) => write!(f, "{p}%"),
        }
    }
}

/// Splits `1.5 GiB` into 1.5 and `GiB`. Negative numbers are no quantities.
fn split_number(s: &str) -> Option<(f64, &str)> {
    let s = s.trim();
    let end = s.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(s.len());
    let number: f64 = s[..end].parse().ok()?;
    Some((number, s[end..].trim_start()))
}

struct Quantity<T>(std::marker::PhantomData<T>, &'static str);

impl<T: FromStr<Err = BadQuantity>> Visitor<'_> for Quantity<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a {}", self.1)
    }

    fn visit_str<E: de::Error>(self, s: &str) -> Result<T, E> {
        s.parse().map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, n: i64) -> Result<T, E> {
        self.visit_str(&n.to_string())
    }

    fn visit_u64<E: de::Error>(self, n: u64) -> Result<T, E> {
        self.visit_str(&n.to_string())
    }
}

macro_rules! serde_as_text {
    ($($name:ident),*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                d.deserialize_any(Quantity::<Self>(std::marker::PhantomData, Self::EXPECTED))
            }
        }
    )*};
}

serde_as_text!(Period, Size, MemoryAmount);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, ms) in [
            ("60s", 60_000),
            ("1.5m", 90_000),
            ("250ms", 250),
            ("2h", 7_200_000),
            ("1 d", 86_400_000),
            ("0", 0),
            ("0.3s", 300),
        ] {
            assert_eq!(text.parse::<Period>().map(Period::millis), Ok(ms), "{text}");
        }
        for bad in ["", "60", "s", "-1s", "1x", "1.2.3s", "1e9d", "99999999d", "5 minutes"] {
            assert!(bad.parse::<Period>().is_err(), "{bad:?}");
        }
        assert_eq!("40us".parse::<Period>().map(Period::millis), Ok(1));
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("4096", 4096),
            ("8 MiB", 8 << 20),
            ("8MiB", 8 << 20),
            ("1.5 GiB", 3 << 29),
            ("100 MB", 100_000_000),
            ("512m", 512 << 20),
            ("0", 0),
        ] {
            assert_eq!(text.parse::<Size>(), Ok(Size(bytes)), "{text}");
        }
        for bad in ["", "MiB", "-1", "1 XiB", "99999999 TiB"] {
            assert!(bad.parse::<Size>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn memory_amounts_are_bytes_or_a_share() {
        assert_eq!("80%".parse(), Ok(MemoryAmount::Percent(80)));
        assert_eq!("80%".parse::<MemoryAmount>().unwrap().of(1000), 800);
        assert_eq!("16 GiB".parse::<MemoryAmount>().unwrap().of(1), 16 << 30);
        for bad in ["0%", "101%", "x%", "-1"] {
            assert!(bad.parse::<MemoryAmount>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_text_form_is_the_natural_one() {
        assert_eq!(Period::secs(60).to_string(), "60s");
        assert_eq!(Period::secs(90).to_string(), "90s");
        assert_eq!(Period::secs(600).to_string(), "10m");
        assert_eq!(Period(Duration::from_millis(1500)).to_string(), "1500ms");
        assert_eq!(Size::mib(512).to_string(), "512 MiB");
        assert_eq!(Size(1000).to_string(), "1000");
    }

    proptest! {
        #[test]
        fn text_and_value_agree(us in 0u64..10_000_000_000, bytes in 0u64..1 << 50, p in 1u8..=100) {
            let period = Period(Duration::from_micros(us));
            prop_assert_eq!(period.to_string().parse(), Ok(period));
            let size = Size(bytes);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
            let share = MemoryAmount::Percent(p);
            prop_assert_eq!(share.to_string().parse(), Ok(share));
        }

        #[test]
        fn no_text_makes_it_panic(s in ".{0,20}") {
            let _ = s.parse::<Period>();
            let _ = s.parse::<Size>();
            let _ = s.parse::<MemoryAmount>();
        }
    }
}
