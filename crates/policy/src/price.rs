//! Memory at one price for all functions: budgets by marginal benefit.
//!
//! Keeping a sandbox idle a while longer costs memory for that while, and saves waiting if a
//! request comes. Bought at one price, waiting saved per byte and second, everywhere, no memory
//! could be moved from one function to another and save more; the price at which all that is
//! bought fits the budget is found by bisection.

use serde::{Deserialize, Serialize};

use crate::gaps::Interval;
use crate::model::Model;

/// One function as a buyer of memory.
#[derive(Clone, Debug)]
pub struct Buyer {
    /// What its requests and sandboxes cost.
    pub model: Model,
    /// How often its sandboxes become idle, per second: its rate of requests.
    pub rate: f64,
    /// What becomes of an idle sandbox.
    pub curve: Vec<Interval>,
    /// How many times its waiting counts.
    pub priority: f64,
}

/// How long a function's sandboxes are kept. Milliseconds after the last request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Keep {
    /// Until then they stay warm.
    pub warm_ms: u64,
    /// Until then they are there at all.
    pub purge_ms: u64,
}

/// What a [`Keep`] is expected to bring.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Outlook {
    /// Memory of idle sandboxes, on average, bytes.
    pub bytes: f64,
    /// Waiting for startups per second, seconds.
    pub waiting: f64,
}

/// Waiting that a restore saves against a cold start may be counted on only if there is a
/// difference; smaller ones are noise.
const LEAST_GAIN: f64 = 1e-6;

impl Buyer {
    /// How long to keep at a price in seconds of waiting per byte and second.
    #[must_use]
    pub fn buy(&self, price: f64) -> Keep {
        let m = &self.model;
        let restore = (m.dedup_startup - m.warm_startup).max(LEAST_GAIN) * self.priority;
        let cold = (m.cold_startup - m.dedup_startup).max(LEAST_GAIN) * self.priority;
        let dedup_bytes = (m.dedup_bytes + m.restore_bytes).min(m.warm_bytes);
        let warm_extra = m.warm_bytes - dedup_bytes;
        let best = |gain: f64, bytes: f64| {
            let (mut sum, mut most, mut end) = (0.0, 0.0, 0);
            for i in &self.curve {
                sum += i.reused * gain - price * i.waited_s * bytes;
                if sum > most {
                    (most, end) = (sum, i.end_ms);
                }
            }
            end
        };
        // The two decisions are apart: being there at all costs what a dedup sandbox costs and
        // saves the cold start; being warm costs and saves the rest.
        let purge_ms = best(cold, dedup_bytes);
        Keep { warm_ms: best(restore, warm_extra).min(purge_ms), purge_ms }
    }

    /// What keeping so is expected to bring.
    #[must_use]
    pub fn outlook(&self, keep: Keep) -> Outlook {
        let m = &self.model;
        let mut outlook = Outlook::default();
        let mut reused = 0.0;
        for i in &self.curve {
            let (bytes, startup) = if i.end_ms <= keep.warm_ms {
                (m.warm_bytes, m.warm_startup)
            } else if i.end_ms <= keep.purge_ms {
                (m.dedup_bytes + m.restore_bytes, m.dedup_startup)
            } else {
                break;
            };
            outlook.bytes += i.waited_s * bytes;
            outlook.waiting += i.reused * startup;
            reused += i.reused;
        }
        outlook.waiting += (1.0 - reused).max(0.0) * m.cold_startup;
        Outlook { bytes: outlook.bytes * self.rate, waiting: outlook.waiting * self.rate }
    }
}

/// How long to keep the sandboxes of each function such that idle ones are expected to use at most
/// `budget` bytes together.
#[must_use]
pub fn spend(buyers: &[Buyer], budget: f64) -> Vec<Keep> {
    let bought = |price: f64| buyers.iter().map(|b| b.buy(price)).collect::<Vec<_>>();
    let bytes = |keeps: &[Keep]| -> f64 {
        buyers.iter().zip(keeps).map(|(b, k)| b.outlook(*k).bytes).sum()
    };
    // Free of charge everything is kept as long as anybody can foresee.
    let all = bought(0.0);
    if bytes(&all) <= budget {
        return all;
    }
    // Logarithms of the price: from a second per tebibyte and day, to one per byte and second.
    let (mut cheap, mut dear) = (-40.0_f64, 0.0_f64);
    for _ in 0..40 {
        let middle = f64::midpoint(cheap, dear);
        if bytes(&bought(middle.exp())) > budget {
            cheap = middle;
        } else {
            dear = middle;
        }
    }
    bought(dear.exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gaps::ReuseGaps;
    use proptest::prelude::*;

    fn buyer(gap_ms: u64, bytes: f64, rate: f64) -> Buyer {
        let mut gaps = ReuseGaps::default();
        (0..50).for_each(|_| gaps.reused(gap_ms));
        Buyer {
            model: Model {
                rate,
                peak_rate: rate,
                warm_startup: 0.001,
                dedup_startup: 0.010,
                cold_startup: 0.5,
                execution: 0.1,
                warm_bytes: bytes,
                dedup_bytes: bytes * 0.1,
                restore_bytes: 0.0,
            },
            rate,
            curve: gaps.curve(),
            priority: 1.0,
        }
    }

    #[test]
    fn memory_goes_where_it_saves_the_most() {
        // One is called every ten seconds, one every hour; there is not enough for both warm.
        let buyers = [buyer(10_000, 1e8, 0.1), buyer(3_600_000, 1e8, 1.0 / 3600.0)];
        let keeps = spend(&buyers, 1.3e8);
        assert!(keeps[0].warm_ms >= 10_000, "{keeps:?}");
        assert!(keeps[1].warm_ms < 3_600_000 && keeps[1].purge_ms >= 3_600_000, "{keeps:?}");
        // With plenty everything stays.
        let keeps = spend(&buyers, 1e10);
        assert!(keeps.iter().all(|k| k.warm_ms >= 3_600_000 || k.warm_ms >= 10_000));
        // With nothing nothing does.
        assert!(spend(&buyers, 0.0).iter().all(|k| k.purge_ms == 0));
    }

    #[test]
    fn a_rare_large_function_is_not_starved() {
        let mut large = buyer(1_200_000, 3e8, 1.0 / 1200.0);
        large.model.cold_startup = 8.0;
        let buyers = [buyer(50, 2e7, 20.0), large];
        let keeps = spend(&buyers, 2.0e8);
        assert!(keeps[1].purge_ms >= 1_200_000, "{keeps:?}");
    }

    proptest! {
        #[test]
        fn the_budget_is_kept_and_more_never_hurts(
            list in prop::collection::vec((10u64..20_000_000, 1e6f64..3e8), 1..10),
            budget in 0.0f64..2e9,
        ) {
            let buyers: Vec<_> =
                list.iter().map(|(gap, b)| buyer(*gap, *b, 1e3 / *gap as f64)).collect();
            let sum = |budget: f64| {
                buyers.iter().zip(spend(&buyers, budget)).fold(Outlook::default(), |a, (b, k)| {
                    let o = b.outlook(k);
                    Outlook { bytes: a.bytes + o.bytes, waiting: a.waiting + o.waiting }
                })
            };
            let (less, more) = (sum(budget), sum(budget * 1.5));
            prop_assert!(less.bytes <= budget + 1.0);
            prop_assert!(more.waiting <= less.waiting * (1.0 + 1e-9) + 1e-12);
        }
    }
}
