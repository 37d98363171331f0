//! Random numbers that are the same everywhere.
//!
//! Simulations have to come out the same on every machine and with every version of this program,
//! so neither the generator nor the way from its bits to a distribution may come from elsewhere.

use std::f64::consts::TAU;

/// A generator of pseudo-random numbers: xoshiro256++ (Blackman and Vigna 2019), seeded through
/// splitmix64. Not for secrets.
#[derive(Clone, Debug)]
pub struct Random([u64; 4]);

fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Random {
    /// The generator of a seed. `stream` tells apart generators that share one.
    #[must_use]
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut state = seed ^ splitmix(&mut stream.wrapping_add(0x5851_f42d_4c95_7f2d));
        Self(std::array::from_fn(|_| splitmix(&mut state)))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// Uniform from 0 (included) to 1 (not).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform from 0 to `below` (not included); 0 if that is 0.
    pub fn below(&mut self, below: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(below)) >> 64) as u64
    }

    /// Normal, mean 0 and variance 1 (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let r = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        r * (TAU * self.unit()).cos()
    }

    /// Exponential with mean 1.
    pub fn exponential(&mut self) -> f64 {
        -(1.0 - self.unit()).ln()
    }

    /// Log-normal: e to the power of a normal one of that mean and standard deviation.
    pub fn log_normal(&mut self, mean: f64, deviation: f64) -> f64 {
        (mean + deviation * self.normal()).exp()
    }

    /// Burr (type XII) with shapes c and k, and a scale.
    pub fn burr(&mut self, c: f64, k: f64, scale: f64) -> f64 {
        let u = 1.0 - self.unit();
        scale * (u.powf(-1.0 / k) - 1.0).powf(1.0 / c)
    }

    /// Gamma with that shape and mean 1 (Marsaglia and Tsang 2000).
    pub fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let power = (1.0 - self.unit()).powf(1.0 / shape);
            return self.gamma(shape + 1.0) * (shape + 1.0) / shape * power;
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v <= 0.0 {
                continue;
            }
            if (1.0 - self.unit()).ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v / shape;
            }
        }
    }

    /// Poisson with that mean.
    pub fn poisson(&mut self, mean: f64) -> u64 {
        if mean > 60.0 {
            return (mean + mean.sqrt() * self.normal()).round().max(0.0) as u64;
        }
        let (mut n, mut left) = (0, mean);
        loop {
            left -= self.exponential();
            if left < 0.0 {
                return n;
            }
            n += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean_of(n: usize, mut f: impl FnMut(&mut Random) -> f64) -> f64 {
        let mut r = Random::new(7, 0);
        (0..n).map(|_| f(&mut r)).sum::<f64>() / n as f64
    }

    #[test]
    fn the_distributions_have_their_moments() {
        let near = |a: f64, b: f64| assert!((a - b).abs() < 0.03 * b.abs().max(0.5), "{a} {b}");
        near(mean_of(100_000, Random::unit), 0.5);
        near(mean_of(100_000, Random::normal), 0.0);
        near(mean_of(100_000, |r| r.normal().powi(2)), 1.0);
        near(mean_of(100_000, Random::exponential), 1.0);
        near(mean_of(100_000, |r| r.gamma(0.3)), 1.0);
        near(mean_of(100_000, |r| (r.gamma(0.5) - 1.0).powi(2)), 2.0);
        near(mean_of(100_000, |r| r.poisson(3.5) as f64), 3.5);
        near(mean_of(100_000, |r| r.poisson(200.0) as f64), 200.0);
        near(mean_of(100_000, |r| r.log_normal(-0.38, 1.0)), (-0.38f64 + 0.5).exp());
        near(mean_of(100_000, |r| r.below(10) as f64), 4.5);
    }

    #[test]
    fn a_seed_gives_the_same_numbers_forever() {
        let mut r = Random::new(1, 2);
        let first = [r.bits(), r.bits()];
        let mut again = Random::new(1, 2);
        assert_eq!([again.bits(), again.bits()], first);
        assert_ne!(Random::new(1, 3).bits(), first[0]);
        assert_eq!(Random::new(0, 0).below(0), 0);
    }
}
