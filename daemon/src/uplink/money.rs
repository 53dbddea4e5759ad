//! Money: what was spent today and what is reserved, against the budgets. Pure; the day comes in.
//!
//! Amounts are whole billionths of a US dollar, so that sums are exact. An amount is reserved before a
//! request leaves and settled when its bill is known, so spent and reserved together never pass a budget.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::config;

/// Billionths of a US dollar.
pub type Nano = u64;

/// US dollars as billionths, rounded up.
pub fn nano(usd: f64) -> Nano {
    // Saturates at both ends, and a NaN is 0.
    (usd * 1e9).ceil() as Nano
}

/// Billionths as US dollars.
pub fn usd(nano: Nano) -> f64 {
    nano as f64 / 1e9
}

/// Tokens of an answer, as a provider counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tokens {
    /// Read, those of the prompt cache included.
    pub input: u64,
    /// Of these, taken from the prompt cache.
    pub cached: u64,
    /// Of these, written into the prompt cache.
    pub stored: u64,
    /// Written, those of hidden reasoning included.
    pub output: u64,
}

/// What tokens cost with a provider. Storing in the prompt cache is counted a quarter above reading,
/// which is Anthropic's price; OpenAI reports such tokens, too.
pub fn cost(provider: &config::Provider, tokens: Tokens) -> Nano {
    let fresh = tokens.input.saturating_sub(tokens.cached + tokens.stored) as f64 + tokens.stored as f64 * 1.25;
    nano(
        (fresh * provider.usd_per_million_input_tokens
            + tokens.cached as f64 * provider.usd_per_million_cached_tokens
            + tokens.output as f64 * provider.usd_per_million_output_tokens)
            / 1e6,
    )
}

/// Budgets of a day.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Budgets {
    /// Of the node.
    pub node: Option<Nano>,
    /// Of single tasks.
    pub task: BTreeMap<String, Nano>,
}

/// Why an amount is not reserved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Short {
    /// Not now: it would fit if what is reserved turned out cheaper.
    Reserved,
    /// Not today: it is over what is left of this budget.
    Spent {
        /// `node` or `task`.
        of: &'static str,
        /// The budget.
        budget: Nano,
        /// What is left of it.
        left: Nano,
    },
}

/// Spent and reserved.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Purse {
    /// The day that is counted, in days since 1970 (UTC). It never goes back: a clock that was set back
    /// brings no second budget.
    day: u64,
    spent: BTreeMap<String, Nano>,
    #[serde(skip)]
    reserved: BTreeMap<String, Nano>,
}

impl Purse {
    /// A new day, a new budget; what is reserved counts for it.
    pub fn turn(&mut self, day: u64) {
        if day > self.day {
            self.day = day;
            self.spent.clear();
        }
    }

    /// Reserves an amount for `task`.
    ///
    /// # Errors
    /// See [`Short`].
    pub fn reserve(&mut self, budgets: &Budgets, task: &str, amount: Nano) -> Result<(), Short> {
        let of = |map: &BTreeMap<String, Nano>| map.get(task).copied().unwrap_or(0);
        let all = |map: &BTreeMap<String, Nano>| map.values().sum::<Nano>();
        let check = |name, budget: Option<Nano>, spent: Nano, reserved: Nano| match budget {
            Some(budget) if spent.saturating_add(amount) > budget => {
                Err(Short::Spent { of: name, budget, left: budget.saturating_sub(spent) })
            }
            Some(budget) if spent.saturating_add(reserved).saturating_add(amount) > budget => Err(Short::Reserved),
            _ => Ok(()),
        };
        let node = check("node", budgets.node, all(&self.spent), all(&self.reserved));
        let task_s = check("task", budgets.task.get(task).copied(), of(&self.spent), of(&self.reserved));
        match (node, task_s) {
            (Err(spent @ Short::Spent { .. }), _) | (_, Err(spent @ Short::Spent { .. })) => return Err(spent),
            (Err(short), _) | (_, Err(short)) => return Err(short),
            (Ok(()), Ok(())) => {}
        }
        *self.reserved.entry(task.to_owned()).or_default() += amount;
        Ok(())
    }

    /// Ends a reservation of `reserved`: `spent` is what it came to.
    pub fn settle(&mut self, task: &str, reserved: Nano, spent: Nano) {
        if let Some(open) = self.reserved.get_mut(task) {
            *open = open.saturating_sub(reserved);
        }
        if spent > 0 {
            let sum = self.spent.entry(task.to_owned()).or_default();
            *sum = sum.saturating_add(spent);
        }
    }

    /// What may still be reserved for `task`; none where there is no budget.
    pub fn left(&self, budgets: &Budgets, task: &str) -> Option<Nano> {
        let of = |map: &BTreeMap<String, Nano>| map.get(task).copied().unwrap_or(0);
        let node = budgets.node.map(|budget| {
            let used: Nano = self.spent.values().chain(self.reserved.values()).sum();
            budget.saturating_sub(used)
        });
        let task_s = budgets.task.get(task).map(|budget| budget.saturating_sub(of(&self.spent) + of(&self.reserved)));
        node.into_iter().chain(task_s).min()
    }

    /// What was spent today, by task.
    pub fn spent(&self) -> &BTreeMap<String, Nano> {
        &self.spent
    }
}

/// What one job has cost, and may.
#[derive(Debug, Default)]
pub struct JobPurse {
    most: Option<Nano>,
    committed: AtomicU64,
}

impl JobPurse {
    /// For a job that may cost `most`; none: anything.
    pub fn new(most: Option<f64>) -> Self {
        JobPurse { most: most.map(|usd| (usd.max(0.0) * 1e9) as Nano), committed: AtomicU64::new(0) }
    }

    /// Commits an amount, if the job may cost that much more.
    pub fn reserve(&self, amount: Nano) -> bool {
        let most = self.most.unwrap_or(Nano::MAX);
        let add = |committed: Nano| committed.checked_add(amount).filter(|sum| *sum <= most);
        self.committed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).is_ok()
    }

    /// What was committed came to `spent`.
    pub fn settle(&self, committed: Nano, spent: Nano) {
        let change = |sum: Nano| Some(sum.saturating_sub(committed).saturating_add(spent));
        let _ = self.committed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
    }

    /// What it has cost so far, what is on its way included, US dollars.
    pub fn cost_usd(&self) -> f64 {
        usd(self.committed.load(Ordering::Relaxed))
    }

    /// The bound, US dollars.
    pub fn most_usd(&self) -> Option<f64> {
        self.most.map(usd)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn budgets(node: u64, task: u64) -> Budgets {
        Budgets { node: Some(node), task: [("a".to_owned(), task)].into() }
    }

    #[test]
    fn the_stricter_budget_holds() {
        let mut purse = Purse::default();
        let budgets = budgets(100, 30);
        assert_eq!(purse.reserve(&budgets, "a", 20), Ok(()));
        assert_eq!(purse.reserve(&budgets, "a", 20), Err(Short::Reserved));
        purse.settle("a", 20, 5);
        assert_eq!(purse.left(&budgets, "a"), Some(25));
        assert_eq!(purse.left(&budgets, "b"), Some(95));
        assert_eq!(purse.reserve(&budgets, "a", 26), Err(Short::Spent { of: "task", budget: 30, left: 25 }));
        assert_eq!(purse.reserve(&budgets, "b", 96), Err(Short::Spent { of: "node", budget: 100, left: 95 }));
    }

    #[test]
    fn a_day_begins_once() {
        let mut purse = Purse::default();
        purse.turn(10);
        purse.settle("a", 0, 7);
        purse.turn(9);
        purse.turn(10);
        assert_eq!(purse.spent()["a"], 7);
        purse.turn(11);
        assert!(purse.spent().is_empty());
    }

    #[test]
    fn cached_tokens_have_their_price() {
        let provider = config::Provider {
            usd_per_million_input_tokens: 3.0,
            usd_per_million_output_tokens: 15.0,
            usd_per_million_cached_tokens: 0.3,
            ..config::Provider::new("p", config::Kind::Anthropic, "m")
        };
        let tokens = Tokens { input: 3000, cached: 1000, stored: 1000, output: 100 };
        assert_eq!(cost(&provider, tokens), nano(0.003 + 0.003_75 + 0.000_3 + 0.001_5));
    }

    #[test]
    fn a_job_keeps_its_bound() {
        let purse = JobPurse::new(Some(0.000_000_010));
        assert!(purse.reserve(6) && !purse.reserve(5));
        purse.settle(6, 2);
        assert!(purse.reserve(8) && !purse.reserve(1));
        assert!(JobPurse::new(None).reserve(Nano::MAX));
    }

    proptest! {
        /// However reservations and settlements follow each other: never over a budget.
        #[test]
        fn never_over_a_budget(steps in proptest::collection::vec((0_u64..60, 0_u64..101, any::<bool>()), 0..200)) {
            let budgets = budgets(200, 120);
            let mut purse = Purse::default();
            let mut open = Vec::new();
            for (amount, percent, other) in steps {
                let task = if other { "b" } else { "a" };
                if percent % 2 == 0 {
                    if purse.reserve(&budgets, task, amount).is_ok() {
                        open.push((task, amount));
                    }
                } else if let Some((task, reserved)) = open.pop() {
                    purse.settle(task, reserved, reserved * percent / 100);
                }
                prop_assert!(purse.spent().values().sum::<u64>() <= 200);
                prop_assert!(purse.spent().get("a").copied().unwrap_or(0) <= 120);
            }
            for (task, reserved) in open {
                purse.settle(task, reserved, reserved);
            }
            prop_assert!(purse.spent().values().sum::<u64>() <= 200);
        }
    }
}
