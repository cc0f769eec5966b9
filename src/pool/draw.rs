//! Draws by weight: at random, in turn, and by a hash.

use std::net::SocketAddr;

use fastrand::Rng;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Smooth weighted turns: each member stands at even distances, as often as its weight says.
pub fn turns(members: &[usize], weights: &[f64]) -> Vec<usize> {
    let least = weights.iter().copied().filter(|w| *w > 0.0).fold(f64::INFINITY, f64::min);
    if members.is_empty() || !least.is_finite() {
        return Vec::new();
    }
    // The lightest stands once in a full round, unless the round would become too long.
    let longest = (4 * members.len()).max(4_096) as f64;
    let sum: f64 = weights.iter().sum();
    let scale = (1.0 / least).min(longest / sum);
    let mut places: Vec<(f64, usize)> = Vec::new();
    for (&member, weight) in members.iter().zip(weights) {
        let times = ((weight * scale).round() as usize).max(1);
        places.extend((0..times).map(|k| ((k as f64 + 0.5) / times as f64, member)));
    }
    places.sort_by(|a, b| a.0.total_cmp(&b.0));
    places.into_iter().map(|(_, member)| member).collect()
}

/// Draws an index by weight in constant time (Walker 1977, built as by Vose 1991).
#[derive(Debug, Default)]
pub struct Alias {
    chance: Vec<f64>,
    other: Vec<u32>,
}

impl Alias {
    /// For these weights; all alike when they are all zero.
    pub fn new(weights: &[f64]) -> Alias {
        let n = weights.len();
        let sum: f64 = weights.iter().sum();
        if n == 0 || sum <= 0.0 {
            return Alias { chance: vec![1.0; n], other: (0..n as u32).collect() };
        }
        let mut chance: Vec<f64> = weights.iter().map(|weight| weight * n as f64 / sum).collect();
        let mut other: Vec<u32> = (0..n as u32).collect();
        let (mut small, mut large): (Vec<usize>, Vec<usize>) = (0..n).partition(|&i| chance[i] < 1.0);
        while let (Some(s), Some(&l)) = (small.pop(), large.last()) {
            other[s] = l as u32;
            chance[l] -= 1.0 - chance[s];
            if chance[l] < 1.0 {
                large.pop();
                small.push(l);
            }
        }
        // What is left is 1 but for rounding.
        small.into_iter().chain(large).for_each(|i| chance[i] = 1.0);
        Alias { chance, other }
    }

    /// An index of one of the weights.
    pub fn draw(&self, rng: &mut Rng) -> usize {
        let i = rng.usize(..self.chance.len());
        if rng.f64() < self.chance[i] { i } else { self.other[i] as usize }
    }
}

/// Lookup table of Maglev hashing (Eisenbud et al. 2016), weighted by turns.
#[derive(Debug)]
pub struct Maglev(Vec<u32>);

/// Table sizes: primes, at least a hundred times the members where that is affordable.
const MAGLEV_SIZES: [usize; 7] = [251, 1_021, 4_093, 16_381, 65_537, 131_071, 524_287];

impl Maglev {
    /// Of members with these addresses and weights.
    pub fn new(members: impl Iterator<Item = (SocketAddr, u32)>) -> Maglev {
        let members: Vec<_> = members.collect();
        let n = members.len();
        let size = MAGLEV_SIZES.into_iter().find(|size| *size >= 100 * n).unwrap_or(MAGLEV_SIZES[6]);
        // The place of a member follows from its address alone, so that others may come and go.
        let seeds = members.iter().map(|(address, _)| {
            let name = address.to_string();
            let offset = xxh3_64_with_seed(name.as_bytes(), 1) as usize % size;
            let skip = xxh3_64_with_seed(name.as_bytes(), 2) as usize % (size - 1) + 1;
            (offset, skip)
        });
        let seeds: Vec<_> = seeds.collect();
        let heaviest = members.iter().map(|(_, weight)| *weight).max().unwrap_or(1);
        let mut table = vec![u32::MAX; size];
        let mut next: Vec<usize> = seeds.iter().map(|(offset, _)| *offset).collect();
        let mut due = vec![0u64; n];
        let mut filled = 0;
        while filled < size && n > 0 {
            for i in 0..n {
                // A member of half the weight takes every other turn.
                due[i] += u64::from(members[i].1);
                if due[i] < u64::from(heaviest) {
                    continue;
                }
                due[i] -= u64::from(heaviest);
                while table[next[i]] != u32::MAX {
                    next[i] = (next[i] + seeds[i].1) % size;
                }
                table[next[i]] = i as u32;
                filled += 1;
                if filled == size {
                    break;
                }
            }
        }
        Maglev(table)
    }

    /// The index of the member for a hash; there must be one.
    pub fn lookup(&self, hash: u64) -> usize {
        self.0[(hash % self.0.len() as u64) as usize] as usize
    }
}
