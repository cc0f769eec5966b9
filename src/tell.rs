//! What the log says of a backend's state.

use crate::health::{Source, State, Transition};

/// A backend has another state. That it is down is worth waking somebody for.
pub fn transition(pool: &str, cell: &str, backend: &str, transition: &Transition) {
    let cause = transition.cause;
    macro_rules! tell {
        ($level:ident) => {
            tracing::$level!(
                pool,
                cell,
                backend,
                from = transition.from.word(),
                to = transition.to.word(),
                cause = cause.kind,
                depth = cause.depth.word(),
                times = cause.times,
                seen_by = if cause.source == Source::Probe { "probe" } else { "traffic" },
                detected_ms = transition.detected.map(|d| d.as_millis() as u64),
                "transition"
            )
        };
    }
    if transition.to == State::Down {
        tell!(warn);
    } else {
        tell!(info);
    }
}
