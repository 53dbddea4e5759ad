//! Exact binomial probabilities and the bounds of Clopper and Pearson (1934).

/// The probability of at most `k` of `n`, each with chance `p`.
pub fn at_most(k: usize, n: usize, p: f64) -> f64 {
    if k >= n || p <= 0.0 {
        return 1.0;
    }
    if p >= 1.0 {
        return 0.0;
    }
    sums(n, p).nth(k).map_or(1.0, |sum| sum.min(1.0))
}

/// The probabilities of at most 0, 1, 2 … of `n`, for `p` between 0 and 1.
fn sums(n: usize, p: f64) -> impl Iterator<Item = f64> {
    // Summed as logarithms: of many cases each term alone would be too small for a number.
    let odds = p.ln() - (-p).ln_1p();
    let first = n as f64 * (-p).ln_1p();
    let next = move |&(i, term, sum): &(usize, f64, f64)| {
        (i < n).then(|| {
            let term = term + ((n - i) as f64).ln() - ((i + 1) as f64).ln() + odds;
            let most = term.max(sum);
            (i + 1, term, most + ((sum - most).exp() + (term - most).exp()).ln())
        })
    };
    std::iter::successors(Some((0, first, first)), next).map(|(_, _, sum): (usize, f64, f64)| sum.exp())
}

/// The most of `n` that show a chance under `p`: so few come with a probability of at most `risk`. None: even
/// without a single one `n` are too few.
pub fn passing(n: usize, p: f64, risk: f64) -> Option<usize> {
    if !(0.0 < p && p < 1.0) {
        return (p >= 1.0).then_some(n);
    }
    sums(n, p).take_while(|sum| *sum <= risk).count().checked_sub(1)
}

/// The largest chance that `k` of `n` leave possible: under a larger one, as few as `k` would come with a
/// probability under `risk`.
pub fn upper(k: usize, n: usize, risk: f64) -> f64 {
    if k >= n {
        return 1.0;
    }
    bisect(|p| at_most(k, n, p) > risk)
}

/// The smallest chance that `k` of `n` leave possible.
pub fn lower(k: usize, n: usize, risk: f64) -> f64 {
    if k == 0 {
        return 0.0;
    }
    bisect(|p| 1.0 - at_most(k - 1, n, p) < risk)
}

/// Where `below` turns from true to false between 0 and 1.
fn bisect(below: impl Fn(f64) -> bool) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if below(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    (low + high) / 2.0
}

/// The fewest cases that can show a chance of under `most` at this `risk`: so many with none at all.
pub fn fewest(most: f64, risk: f64) -> usize {
    (risk.ln() / (-most).ln_1p()).ceil() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_the_tables() {
        // scipy.stats.binom.cdf
        for (k, n, p, expected) in [
            (0, 10, 0.1, 0.348_678_440_1),
            (2, 10, 0.1, 0.929_809_173_6),
            (5, 100, 0.05, 0.615_999_127_7),
            (50, 100_000, 0.001, 2.371_183e-8),
            (10, 10, 0.5, 1.0),
        ] {
            let found = at_most(k, n, p);
            assert!((found / expected - 1.0).abs() < 1e-3, "{k} of {n} at {p}: {found}, not {expected}");
        }
    }

    #[test]
    fn bounds_are_those_of_clopper_and_pearson() {
        // 3 of 50 at 95 %: scipy.stats.binomtest(3, 50).proportion_ci()
        assert!((lower(3, 50, 0.025) - 0.012_548_6).abs() < 1e-6);
        assert!((upper(3, 50, 0.025) - 0.165_481_9).abs() < 1e-6);
        assert_eq!((lower(0, 50, 0.025), upper(50, 50, 0.025)), (0.0, 1.0));
    }

    #[test]
    fn the_fewest_cases_are_just_enough() {
        for (most, risk) in [(0.05, 0.1), (0.01, 0.1), (0.02, 0.05)] {
            let n = fewest(most, risk);
            assert!(at_most(0, n, most) <= risk && at_most(0, n - 1, most) > risk, "{most} {risk}: {n}");
            assert_eq!((passing(n, most, risk), passing(n - 1, most, risk)), (Some(0), None));
            let k = passing(1000, most, risk).expect("enough");
            assert!(at_most(k, 1000, most) <= risk && at_most(k + 1, 1000, most) > risk);
        }
    }
}
