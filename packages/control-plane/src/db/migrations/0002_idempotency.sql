-- What a key made, written in the transaction that made it: whoever takes over
-- the claim of a replica that died goes on with that, and makes nothing anew.
alter table idempotency_keys add column resource_id text;
