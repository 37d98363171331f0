//! How often a function was called in each minute, packed.

use serde::{Deserialize, Serialize};

use crate::random::Random;

/// What calls a function. It decides how arrivals are placed inside a minute.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trigger {
    /// A clock: evenly spread over the minute, always at the same second.
    Timer,
    /// Anything else: uniform, as a Poisson process is given its count.
    #[default]
    Other,
}

impl Trigger {
    /// The trigger of that name in the data set.
    #[must_use]
    pub fn parse(name: &str) -> Self {
        if name.trim().eq_ignore_ascii_case("timer") { Self::Timer } else { Self::Other }
    }
}

/// Counts of consecutive minutes: most are 0, so runs of those take a byte or two.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MinuteCounts {
    /// Pairs of variable-length integers: minutes without arrivals, then a count.
    packed: Vec<u8>,
    zeros: u32,
    minutes: u32,
    total: u64,
}

impl MinuteCounts {
    /// Adds the next minute.
    pub fn push(&mut self, count: u32) {
        self.minutes += 1;
        if count == 0 {
            self.zeros += 1;
            return;
        }
        put(&mut self.packed, std::mem::take(&mut self.zeros));
        put(&mut self.packed, count);
        self.total += u64::from(count);
    }

    /// All arrivals together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// How many minutes there are.
    #[must_use]
    pub fn minutes(&self) -> u32 {
        self.minutes
    }

    /// The minutes that have arrivals, with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> {
        let mut cursor = Cursor::default();
        std::iter::from_fn(move || cursor.next(self))
    }
}

/// A place in [`MinuteCounts`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cursor {
    at: usize,
    minute: u32,
}

impl Cursor {
    /// The next minute with arrivals.
    pub(crate) fn next(&mut self, counts: &MinuteCounts) -> Option<(u32, u32)> {
        let zeros = take(&counts.packed, &mut self.at)?;
        let count = take(&counts.packed, &mut self.at)?;
        let minute = self.minute + zeros;
        self.minute = minute + 1;
        Some((minute, count))
    }
}

fn put(out: &mut Vec<u8>, mut n: u32) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn take(bytes: &[u8], at: &mut usize) -> Option<u32> {
    let (mut n, mut shift) = (0u32, 0);
    loop {
        let b = *bytes.get(*at)?;
        *at += 1;
        n |= u32::from(b & 0x7f) << shift;
        if b < 0x80 {
            return Some(n);
        }
        shift += 7;
    }
}

/// Where `count` arrivals of one minute are placed: microseconds from its beginning, not sorted.
/// `phase` is a number that stays the same for a function.
pub(crate) fn place(
    random: &mut Random,
    trigger: Trigger,
    phase: u64,
    count: u32,
) -> impl Iterator<Item = u64> {
    const MINUTE_US: u64 = 60_000_000;
    let step = MINUTE_US / u64::from(count.max(1));
    (0..u64::from(count)).map(move |i| match trigger {
        Trigger::Timer => (phase % step.max(1)) + i * step,
        Trigger::Other => random.below(MINUTE_US),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn counts_come_back(list in prop::collection::vec(prop_oneof![
            4 => Just(0u32), 2 => 0u32..300, 1 => any::<u32>()
        ], 0..2000)) {
            let mut packed = MinuteCounts::default();
            list.iter().for_each(|c| packed.push(*c));
            let mut back = vec![0; list.len()];
            packed.iter().for_each(|(m, c)| back[m as usize] = c);
            prop_assert_eq!(&back, &list);
            prop_assert_eq!(packed.total(), list.iter().map(|c| u64::from(*c)).sum::<u64>());
        }

        #[test]
        fn arrivals_stay_in_their_minute(seed: u64, phase: u64, count in 0u32..5000) {
            let mut random = Random::new(seed, 0);
            for trigger in [Trigger::Timer, Trigger::Other] {
                let list: Vec<_> = place(&mut random, trigger, phase, count).collect();
                prop_assert_eq!(list.len(), count as usize);
                prop_assert!(list.iter().all(|us| *us < 60_000_000));
            }
        }
    }
}
