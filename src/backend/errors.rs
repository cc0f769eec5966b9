//! Errors and denials among a backend's answers: which are a matter of a class of requests, and which of the backend.

use std::sync::PoisonError;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::Backend;
use crate::class::{Avoids, Says};
use crate::clock::Time;
use crate::error_ratio::ErrorRatio;
use crate::health::{Blame, Depth, Evidence, Health, Policy, Seen, Source, State};

/// Bursts of denials are told of this many seconds apart.
const DENIALS_APART: u64 = 60;
/// A prefix that gets errors for at least this share of its requests elsewhere brings them along.
pub(super) const EVERYWHERE: f64 = 0.5;
/// Classes of requests are told apart for this long after an error.
const CLASSES_WATCHED_MS: u64 = 10_000;
/// Errors that all have alike are looked at from their beginning for this long.
const ALIKE_FOR: Duration = Duration::from_secs(10);

impl Backend {
    /// What the answer to a request of `class` says of this backend: whether it is an error.
    pub fn replied(&self, policy: &Policy, prefix: u32, class: u64, error: bool, began: Time, now: Time) {
        if self.class_replied(prefix, class, error, now) {
            return;
        }
        if !error {
            self.went_well(prefix, now);
            let view = self.view();
            if view.state != State::Up || view.open_run.is_some() {
                self.success(policy, Source::Traffic, Depth::Answer, began, now);
            }
            return;
        }
        let known = self.shared.failing.failed(prefix, self.id, &self.answered, now);
        // It may have answered nobody well yet: then this prefix is as good a witness as there is.
        let others = self.answered.others(prefix, now);
        let blame = known.unwrap_or(Blame { prefix, others, elsewhere: 0.0, tries_elsewhere: 0 });
        self.went_wrong(policy, Depth::Answer, blame, began, now);
    }

    /// Whether an error is a matter of its class alone. Classes are looked at for a while after each error only.
    fn class_replied(&self, prefix: u32, class: u64, error: bool, now: Time) -> bool {
        let ms = now.0 / 1_000;
        if !error && self.classes_until.load(Relaxed) < ms && !self.class_fails.load(Relaxed) {
            return false;
        }
        let mut classes = self.classes.lock().unwrap_or_else(PoisonError::into_inner);
        let (turned, says) = if error {
            self.classes_until.store(ms + CLASSES_WATCHED_MS, Relaxed);
            let says = classes.bad(class, prefix, self.answered.others(prefix, now), now);
            (says == Says::ClassFails, says)
        } else {
            (classes.good(class, now), Says::Backend)
        };
        let any = classes.any_failing();
        match (self.class_fails.swap(any, Relaxed), any) {
            (false, true) => drop(self.shared.classes_failing.fetch_add(1, Relaxed)),
            (true, false) => drop(self.shared.classes_failing.fetch_sub(1, Relaxed)),
            _ => {}
        }
        let failing = classes.is_failing(class);
        drop(classes);
        if turned {
            self.counters.class_failures.add(u64::from(failing));
            if failing {
                // What is known to be the class's is nothing of the backend's.
                *self.ratio.lock().unwrap_or_else(PoisonError::into_inner) = ErrorRatio::default();
            }
            if !self.told_too_often(now) {
                tracing::info!(
                    pool = &*self.shared.name,
                    backend = &*self.name,
                    failing,
                    "class of requests: its answers are {}",
                    if failing { "errors, those of others are not; it goes elsewhere" } else { "good again" }
                );
            }
        }
        error && says != Says::Backend
    }

    /// Whether a class of requests fails here, and goes elsewhere.
    pub fn has_failing_class(&self) -> bool {
        self.class_fails.load(Relaxed)
    }

    /// Whether a request of this class should go elsewhere because its class fails here.
    pub fn avoids_class(&self, class: u64, repeatable: bool, may_try: bool, now: Time) -> Avoids {
        if !self.class_fails.load(Relaxed) {
            return Avoids::No;
        }
        self.classes.lock().unwrap_or_else(PoisonError::into_inner).avoids(class, repeatable, may_try, now)
    }

    /// A client of `prefix` got what it came for.
    pub(super) fn went_well(&self, prefix: u32, now: Time) {
        self.answered.note(prefix, now);
        self.shared.failing.answered(prefix, self.id);
        self.shared.answers.count(self.id, false);
        self.good_ms.store(now.0 / 1_000, Relaxed);
        if self.watched.load(Relaxed) {
            let mut ratio = self.ratio.lock().unwrap_or_else(PoisonError::into_inner);
            ratio.good(self.good.swap(0, Relaxed) + 1);
            self.watched.store(ratio.open(), Relaxed);
        } else {
            self.good.fetch_add(1, Relaxed);
        }
    }

    /// Its errors begin to be looked at; not anew while all have had as many.
    fn errors_begin(&self, now: Time) {
        let mut since = self.errors_since.lock().unwrap_or_else(PoisonError::into_inner);
        if since.as_ref().is_none_or(|(_, until)| *until <= now) {
            *since = Some((self.shared.answers.mark(), now));
        }
    }

    /// Whether the others of its pool have had as many errors since its own began. One that is doubted has been compared with them.
    pub(super) fn errs_like_the_others(&self, health: &Health, now: Time) -> bool {
        if matches!(health.state(), State::Suspect | State::Down) {
            return false;
        }
        let mut since = self.errors_since.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((before, until)) = since.as_mut() else { return false };
        let alike = self.shared.answers.mark().is_like_the_others(self.id, before);
        if alike && *until <= now {
            *until = now + ALIKE_FOR;
        }
        alike
    }

    /// A client got an error, or nothing: whether that happens more often than it used to.
    pub(super) fn went_wrong(&self, policy: &Policy, depth: Depth, blame: Blame, began: Time, now: Time) {
        let doubted = matches!(self.view().state, State::Suspect | State::Down);
        if doubted && blame.elsewhere >= EVERYWHERE {
            // What this client meets on other backends too says nothing about a doubted one.
            return;
        }
        let mut ratio = self.ratio.lock().unwrap_or_else(PoisonError::into_inner);
        ratio.good(self.good.swap(0, Relaxed));
        if !doubted && !ratio.open() {
            self.errors_begin(now);
        }
        self.shared.answers.count(self.id, true);
        let alarm = if doubted {
            ratio.known();
            true
        } else {
            ratio.bad(blame)
        };
        self.watched.store(ratio.open(), Relaxed);
        drop(ratio);
        if alarm {
            let evidence = Evidence { source: Source::Traffic, depth, seen: Seen::Errors, began };
            self.observe(policy, &evidence, now);
        }
    }

    /// An answer that denies its client something, or one that does not. They are the client's matter; but where nearly none
    /// used to be, a burst of them may be a lost key or a broken limit of the cell's, and is told of.
    pub fn denied(&self, prefix: u32, denied: bool, now: Time) {
        if !denied {
            self.undenied.fetch_add(1, Relaxed);
            return;
        }
        let mut ratio = self.denials.lock().unwrap_or_else(PoisonError::into_inner);
        ratio.good(self.undenied.swap(0, Relaxed));
        let others = self.answered.others(prefix, now);
        let burst = ratio.bad(Blame { prefix, others, elsewhere: 0.0, tries_elsewhere: 0 });
        if burst {
            // What goes on is the past of tomorrow.
            ratio.known();
        }
        drop(ratio);
        if !burst {
            return;
        }
        self.counters.denial_bursts.add(1);
        let told = self.denials_told.load(Relaxed);
        if told > 0 && now.seconds() < told + DENIALS_APART {
            return;
        }
        self.denials_told.store(now.seconds().max(1), Relaxed);
        tracing::info!(
            pool = &*self.shared.name,
            backend = &*self.name,
            "a burst of 401, 403 or 429, which were rare before; nothing is done about it"
        );
    }
}
