//! Checking what a caller gave: each argument once, with its name, its range and its SQLSTATE.

use crate::error::{Error, Result};
use crate::pg::call::{Args, Elements, Value};
use crate::settings;
use std::ops::RangeInclusive;

/// A text that must not be null.
pub fn text(args: &Args, position: usize, name: &'static str) -> Result<String> {
    args.value(position).text().ok_or(Error::Null { argument: name, hint: None })
}

/// A flag; null means its default.
pub fn flag(args: &Args, position: usize, default: bool) -> bool {
    args.value(position).get::<bool>().unwrap_or(default)
}

/// A message's id that must not be null.
pub fn msg_id(args: &Args, position: usize) -> Result<i64> {
    args.value(position).i64().ok_or(Error::Null { argument: "msg_id", hint: None })
}

/// A lease's id, if one was given.
pub fn lease_id(args: &Args, position: usize) -> Option<i64> {
    args.value(position).i64()
}

/// The elements of an array that must be one-dimensional and not null itself.
pub fn array(args: &Args, position: usize, name: &'static str) -> Result<Vec<Value>> {
    let value = args.value(position);
    if value.is_null() {
        return Err(Error::Null { argument: name, hint: None });
    }
    match value.elements(settings::BATCH_MAX) {
        Elements::These(elements) => Ok(elements),
        Elements::TooMany(len) => Err(Error::argument(
            name,
            format!("{len} elements"),
            format!("at most {} elements", settings::BATCH_MAX),
        )),
        Elements::Matrix => Err(Error::Arguments {
            message: format!("argument \"{name}\" must be a one-dimensional array"),
            hint: None,
        }),
    }
}

/// An optional array that must be as long as the one it goes with.
pub fn array_beside(
    args: &Args,
    position: usize,
    name: &'static str,
    len: usize,
) -> Result<Option<Vec<Value>>> {
    if args.value(position).is_null() {
        return Ok(None);
    }
    let elements = array(args, position, name)?;
    if elements.len() != len {
        return Err(Error::Arguments {
            message: format!("argument \"{name}\" has {} elements, but {len} are needed", elements.len()),
            hint: Some("Arrays of one call must be equally long.".into()),
        });
    }
    Ok(Some(elements))
}

/// The ids of an array, each once, in the order of their first appearance, with the leases that go with them.
pub fn ids(args: &Args, ids_at: usize, leases_at: usize) -> Result<Vec<(i64, Option<i64>)>> {
    let ids = array(args, ids_at, "msg_ids")?;
    let leases = array_beside(args, leases_at, "lease_ids", ids.len())?;
    let mut seen = std::collections::HashSet::with_capacity(ids.len());
    let mut result = Vec::with_capacity(ids.len());
    for (i, id) in ids.iter().enumerate() {
        let id = id.i64().ok_or(Error::Null { argument: "msg_ids", hint: None })?;
        let lease = match &leases {
            Some(leases) => Some(leases[i].i64().ok_or(Error::Null { argument: "lease_ids", hint: None })?),
            None => None,
        };
        if seen.insert(id) {
            result.push((id, lease));
        }
    }
    Ok(result)
}

/// The ids of an optional array, ascending, each once.
pub fn ids_if_any(args: &Args, position: usize) -> Result<Option<Vec<i64>>> {
    if args.value(position).is_null() {
        return Ok(None);
    }
    let mut ids = Vec::new();
    for id in array(args, position, "msg_ids")? {
        ids.push(id.i64().ok_or(Error::Null { argument: "msg_ids", hint: None })?);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(Some(ids))
}

/// A whole number within a range; null means its default.
pub fn number(
    args: &Args,
    position: usize,
    name: &'static str,
    default: i64,
    range: RangeInclusive<i64>,
) -> Result<i64> {
    let value = args.value(position).i64().unwrap_or(default);
    if range.contains(&value) {
        Ok(value)
    } else {
        Err(Error::argument(name, value, format!("{} to {}", range.start(), range.end())))
    }
}

/// How many messages a call is to take.
pub fn quantity(args: &Args, position: usize, default: i64) -> Result<usize> {
    number(args, position, "quantity", default, 1..=settings::BATCH_MAX as i64).map(|n| n as usize)
}

/// An interval in microseconds within a range; `None` if it is null. Months and years are refused, for they have
/// no length.
pub fn duration(value: Value, name: &'static str, range: RangeInclusive<i64>) -> Result<Option<i64>> {
    let Some((months, days, micros)) = value.interval() else { return Ok(None) };
    let describe = |us: i64| match us {
        0 => "0".to_owned(),
        us if us % settings::DAY_US == 0 => format!("{} days", us / settings::DAY_US),
        us => format!("{} ms", us as f64 / 1_000.0),
    };
    let allowed = || format!("{} to {}, without months", describe(*range.start()), describe(*range.end()));
    let total = i64::from(days).checked_mul(settings::DAY_US).and_then(|d| d.checked_add(micros));
    match total {
        Some(us) if months == 0 && range.contains(&us) => Ok(Some(us)),
        _ => {
            let shown = if months != 0 {
                "an interval with months".to_owned()
            } else {
                describe(total.unwrap_or(i64::MAX))
            };
            Err(Error::argument(name, shown, allowed()))
        }
    }
}

/// Refuses an argument whose capability is not built, unless it is null or its default.
pub fn unbuilt(is_default: bool, what: &str) -> Result<()> {
    if is_default {
        Ok(())
    } else {
        Err(Error::NotBuilt { what: format!("argument \"{what}\"") })
    }
}
