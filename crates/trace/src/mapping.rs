//! Which of the functions at hand stands for which function of a trace.

/// What functions are compared by. Both are compared by rank among their like, so any unit will
/// do: the functions at hand are never as slow, nor as large, as a cloud's.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Traits {
    /// How long a call takes; `None` if it is not known.
    pub duration: Option<f64>,
    /// Its memory; `None` if it is not known.
    pub memory: Option<f64>,
}

/// For each function of a trace, the one of `at_hand` whose rank by duration and by memory among
/// those at hand is nearest to its own rank in the trace. Where a trait is not known it does not
/// count; without both, functions are dealt out in turn.
#[must_use]
pub fn map_functions(trace: &[Traits], at_hand: &[Traits]) -> Vec<usize> {
    if at_hand.is_empty() {
        return Vec::new();
    }
    let ranked = |list: &[Traits]| {
        let durations = ranks(list.iter().map(|t| t.duration));
        let memories = ranks(list.iter().map(|t| t.memory));
        durations.into_iter().zip(memories).collect::<Vec<_>>()
    };
    let candidates = ranked(at_hand);
    let distance = |a: Option<f64>, b: Option<f64>| match (a, b) {
        (Some(a), Some(b)) => (a - b) * (a - b),
        _ => 0.0,
    };
    ranked(trace)
        .into_iter()
        .enumerate()
        .map(|(i, (duration, memory))| {
            if duration.is_none() && memory.is_none() {
                return i % at_hand.len();
            }
            let nearest = candidates.iter().enumerate().min_by(|(_, a), (_, b)| {
                let of = |c: &(Option<f64>, Option<f64>)| {
                    distance(c.0, duration) + distance(c.1, memory)
                };
                of(a).total_cmp(&of(b))
            });
            nearest.map_or(0, |(n, _)| n)
        })
        .collect()
}

/// The place of each value among all, from 0 to 1; equal values have the same, the middle one.
fn ranks(values: impl Iterator<Item = Option<f64>>) -> Vec<Option<f64>> {
    let values: Vec<_> = values.collect();
    let mut sorted: Vec<f64> = values.iter().flatten().copied().collect();
    sorted.sort_by(f64::total_cmp);
    values
        .iter()
        .map(|v| {
            v.map(|v| {
                let below = sorted.partition_point(|s| *s < v);
                let equal = sorted.partition_point(|s| *s <= v) - below;
                (below as f64 + equal as f64 / 2.0) / sorted.len() as f64
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn t(duration: f64, memory: f64) -> Traits {
        Traits { duration: Some(duration), memory: Some(memory) }
    }

    #[test]
    fn functions_are_matched_by_rank() {
        let at_hand = [t(5.0, 10.0), t(10.0, 100.0), t(20.0, 50.0)];
        let trace = [t(1e5, 400.0), t(10.0, 120.0), t(900.0, 900.0)];
        assert_eq!(map_functions(&trace, &at_hand), [2, 0, 1]);
        assert_eq!(map_functions(&trace, &[]), Vec::<usize>::new());
    }

    #[test]
    fn what_is_not_known_does_not_count() {
        let at_hand = [t(5.0, 10.0), t(10.0, 100.0)];
        let unknown = Traits { duration: None, memory: None };
        assert_eq!(map_functions(&[unknown; 4], &at_hand), [0, 1, 0, 1]);
        let by_memory = |m| Traits { duration: None, memory: Some(m) };
        assert_eq!(map_functions(&[by_memory(1e9), by_memory(1e6)], &at_hand), [1, 0]);
    }
}
