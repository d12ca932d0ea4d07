//! A cache of bounded size that forgets the least recently used entries.

use std::{collections::HashMap, hash::Hash, mem};

/// Values by key, at most twice as many as a generation. When the young entries fill a generation, they become the old
/// entries. Old entries are forgotten unless they are used again.
#[derive(Debug)]
pub struct Recent<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    generation: usize,
}

impl<K: Eq + Hash, V: Clone> Recent<K, V> {
    /// Makes a cache with this many entries per generation.
    #[must_use]
    pub fn new(generation: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), generation }
    }

    /// Returns the value of a key, if the cache still contains it.
    pub fn get(&mut self, key: &K) -> Option<V> {
        if let Some(value) = self.young.get(key) {
            return Some(value.clone());
        }
        let (key, value) = self.old.remove_entry(key)?;
        self.insert(key, value.clone());
        Some(value)
    }

    /// Adds or replaces an entry.
    pub fn insert(&mut self, key: K, value: V) {
        if self.young.len() >= self.generation {
            self.old = mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }

    /// Returns the number of entries.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn used_entries_stay_and_the_number_is_bounded() {
        let mut recent = Recent::new(10);
        for key in 0..1000 {
            recent.insert(key, key);
            assert_eq!(recent.get(&0), Some(0), "after {key}");
            assert!(recent.len() <= 20);
        }
        assert_eq!((recent.get(&999), recent.get(&1)), (Some(999), None));
    }
}
