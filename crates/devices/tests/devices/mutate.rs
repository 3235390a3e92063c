//! Damage to a JSON value.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// The value with a few places of it damaged.
pub fn mutations(value: Value) -> impl Strategy<Value = Value> {
    prop::collection::vec((any::<prop::sample::Index>(), damage()), 1..4).prop_map(move |damages| {
        let mut value = value.clone();
        for (place, damage) in damages {
            let mut left = place.index(count(&value));
            apply(&mut value, &mut left, &damage);
        }
        value
    })
}

#[derive(Clone, Debug)]
enum Damage {
    Replace(Value),
    /// Removes the last element, field or character.
    Shorten,
    /// Adds one.
    Lengthen,
    /// Adds to a number, or changes a character.
    Change(i64),
}

fn damage() -> impl Strategy<Value = Damage> {
    let number = prop_oneof![
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0u32..64).prop_map(|bit| Value::from(1u64 << bit)),
        (-2i64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
    ];
    let other = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        "[0-9a-f]{0,300}".prop_map(Value::from),
        ".{0,4}".prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
    ];
    prop_oneof![
        4 => number.prop_map(Damage::Replace),
        2 => other.prop_map(Damage::Replace),
        1 => Just(Damage::Shorten),
        1 => Just(Damage::Lengthen),
        4 => (-300i64..300).prop_map(Damage::Change),
    ]
}

/// How many values it is made of.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(elements) => elements.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// Damages the value that comes after `left` others. True if that was here.
fn apply(value: &mut Value, left: &mut usize, damage: &Damage) -> bool {
    if *left == 0 {
        here(value, damage);
        return true;
    }
    *left -= 1;
    match value {
        Value::Array(elements) => elements.iter_mut().any(|element| apply(element, left, damage)),
        Value::Object(fields) => fields.values_mut().any(|field| apply(field, left, damage)),
        _ => false,
    }
}

fn here(value: &mut Value, damage: &Damage) {
    match (damage, &mut *value) {
        (Damage::Replace(with), _) => *value = with.clone(),
        (Damage::Shorten, Value::Array(elements)) => drop(elements.pop()),
        (Damage::Shorten, Value::String(text)) => drop(text.pop()),
        (Damage::Shorten, Value::Object(fields)) => drop(remove_last(fields)),
        (Damage::Lengthen, Value::Array(elements)) => elements.push(json!(1)),
        (Damage::Lengthen, Value::String(text)) => text.push('0'),
        (Damage::Lengthen, Value::Object(fields)) => drop(fields.insert("more".into(), json!(1))),
        (Damage::Change(by), Value::String(text)) if !text.is_empty() => {
            let at = by.unsigned_abs() as usize % text.chars().count();
            let digit = char::from_digit(by.unsigned_abs() as u32 % 16, 16).unwrap();
            *text = text
                .chars()
                .enumerate()
                .map(|(n, old)| if n == at { digit } else { old })
                .collect();
        }
        (Damage::Change(by), Value::Number(number)) => {
            *value = json!(number.as_i64().unwrap_or_default().wrapping_add(*by));
        }
        _ => *value = Value::Null,
    }
}

fn remove_last(fields: &mut Map<String, Value>) -> Option<Value> {
    let last = fields.keys().next_back()?.clone();
    fields.remove(&last)
}
